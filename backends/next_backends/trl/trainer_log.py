"""The trainer that runs a callback, and its log."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from transformers import Trainer


def trainer_of(callback: Any) -> Trainer | None:
    """Return the trainer that is calling a method of ``callback``; None if no frame of it can be seen.

    transformers hands a callback the model, the optimizer, the dataloaders, but neither the trainer nor the other
    callbacks, and none of these refers to the trainer. The call itself does: a method of the trainer called
    ``CallbackHandler.on_...``, which called the callback, so that ``self`` some frames up is a ``Trainer`` whose
    handler holds this callback. That is true of every subclass and every position in the list. Objects that refer to
    ``state`` (``gc.get_referrers``) would be an alternative, but the search takes as long as the heap is large and
    misses what ``gc.freeze`` has hidden.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):  # one whose constructor has only begun has no handler
            handler = getattr(caller, "callback_handler", None)
            if handler is not None and any(one is callback for one in handler.callbacks):
                return caller
        frame = frame.f_back
    return None


def log_figures(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Log figures of the current step: they reach ``log_history``, every callback and every tracker of ``report_to``.

    This is ``Trainer.log`` itself and not a subclass's, because that of TRL's trainers adds the averages of what they
    have gathered since the last record, such as the reward, and starts anew: these would be missing from the trainer's
    own record. Adding figures to the ``logs`` of the next ``on_log`` is no substitute: that record may come many steps
    later, trackers precede a user's callbacks in the list, and ``log_history`` has its copy already.

    ``on_log`` clears ``should_log``, which may be set because the trainer's own record of this step is still due.
    """
    due = trainer.control.should_log
    Trainer.log(trainer, dict(figures))
    trainer.control.should_log = due

"""The trainer that runs a callback, and its log."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from transformers import Trainer


def trainer_of(callback: Any) -> Trainer | None:
    """Return the trainer that is calling a method of ``callback``; None if no frame of it can be seen.

    transformers does not hand a callback its trainer, nor anything that refers to it. But a method of the trainer has
    called ``CallbackHandler.on_...``, which called the callback: ``self`` some frames up is a ``Trainer`` whose handler
    holds this callback.
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

    This is ``Trainer.log`` itself and not a subclass's: that of TRL's trainers adds the averages of what they have
    gathered since the last record, such as the reward, and starts anew; the trainer's own record would miss them.

    ``on_log`` clears ``should_log``, which may be set because the trainer's own record of this step is still due.
    """
    due = trainer.control.should_log
    Trainer.log(trainer, dict(figures))
    trainer.control.should_log = due

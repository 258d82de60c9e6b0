"""Connects transformers' callback events to a backend that trains from a config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Passes events to ``backend``, a ``TrlBackend``, and the end of each step to ``step_ended``."""

    def __init__(self, backend: Any, step_ended: Callable[[int], None]) -> None:
        self.backend, self.step_ended = backend, step_ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.backend.connect(kwargs["optimizer"], args)
        self.backend.begin(state.global_step, checkpoint_of(args, state))
        if state.global_step >= state.max_steps:
            end_now(self.backend.trainer, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ended(state.global_step)
        if self.backend.ends_after(state.global_step):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.backend.log(state.global_step, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.backend.saved(checkpoint_of(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.backend.finish()


def checkpoint_of(args: Any, state: Any) -> Path:
    """Return the folder that the trainer saves the current step in."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def end_now(trainer: Any, control: Any) -> None:
    """End a training that begins at its last step. The trainer would take one more, as it looks only after a step.

    It gets no batch instead, unless none is left in its last epoch.
    """

    def no_batches(*args: Any, **fields: Any) -> Any:
        del trainer.get_batch_samples
        return ([], None) if trainer.control.should_training_stop else trainer.get_batch_samples(*args, **fields)

    control.should_training_stop, trainer.get_batch_samples = True, no_batches

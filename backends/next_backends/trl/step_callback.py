"""Connects transformers' callback events to a backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class RunIsOver(Exception):  # noqa: N818 - nothing is wrong
    """A run was resumed at its last step: the trainer, its weights loaded, would take a step more before it looks."""


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Passes on what the trainer reports: to the backend, and the end of each step to ``step_ended``."""

    def __init__(self, backend: Any, step_ended: Callable[[int], None]) -> None:
        self._backend, self._step_ended = backend, step_ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.begin(state.global_step, kwargs["optimizer"])
            if state.global_step >= state.max_steps:
                raise RunIsOver

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_ended(state.global_step)
        if self._backend is not None and self._backend.ends_after(state.global_step, args):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.log(state.global_step, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.saved(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.flush()

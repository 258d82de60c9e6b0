"""The one line for a TRL script: a callback that watches the run, jumps, checks the jump, and lets training go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import TrainerCallback

from next_backends.trl.checks import check_arguments
from next_core.config import DEFAULT_PREDICTOR
from next_core.cycle.guards import Guards
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.schedule import Schedule
from next_core.errors import ConfigError
from next_core.interfaces import TrajectoryPredictor
from next_core.plugins import explain, make_predictor

if TYPE_CHECKING:
    from next_backends.trl.backend import TrlBackend


class RunIsOver(Exception):  # noqa: N818 - nothing is wrong
    """A run was resumed at its last step: the trainer, its weights loaded, would take a step more before it looks."""


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Passes on what the trainer reports: to the backend, and the end of each step to ``step_ended``."""

    def __init__(self, backend: TrlBackend | None, step_ended: Callable[[int], None]) -> None:
        self._backend, self._step_ended = backend, step_ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.begin(state.global_step, kwargs["optimizer"])
            if state.global_step >= state.max_steps:
                raise RunIsOver

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_ended(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.log(state.global_step, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._backend is not None:
            self._backend.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_save(args, state, control)


class PredictExtendCallback(StepCallback):
    """Predict-extend for any existing ``GRPOTrainer`` or ``RLOOTrainer``; LoRA or full-parameter.

    ``predictor`` is a name, a mapping (``{"name": "secant", "window": 10}``), or a function that makes one;
    ``schedule`` fields (``observe``, ``every``, ``horizon``, ``alpha``, ``jump_every``, ``jumps``, ``settle``) and
    ``guards`` are those of the config file. ``evaluate(model) -> accuracy`` is the probe; without it the guards that
    need one do not run. Checkpoints, jumps and the journal go to ``folder``, by default ``<output_dir>/next-core``;
    ``resume_from_checkpoint`` takes them up from there. Raises ``ConfigError`` for settings that contradict each other
    or the trainer's, when training begins at the latest.
    """

    def __init__(
        self,
        predictor: str | Mapping[str, Any] | Callable[[], TrajectoryPredictor] = DEFAULT_PREDICTOR,
        *,
        guards: Guards | Mapping[str, Any] | None = None,
        rank: int = 1,
        evaluate: Callable[[Any], float] | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
        strict: bool = False,
        **schedule: Any,
    ) -> None:
        if rank < 1:
            raise ConfigError(f"rank must be at least 1 (got {rank})")
        if callable(predictor):
            self._make = predictor
        else:
            fields = {"name": predictor} if isinstance(predictor, str) else dict(predictor)
            name = str(fields.pop("name", DEFAULT_PREDICTOR))
            self._make = lambda: make_predictor(name, **fields)
        made_for = self._make().made_for  # a wrong name or field is an error now, not 50 steps later
        self.schedule: Schedule = _validated(Schedule, {**made_for.get("schedule", {}), **schedule})
        given = {} if guards is None else guards
        self.guards: Guards = (
            given if isinstance(given, Guards) else _validated(Guards, {**made_for.get("guards", {}), **given})
        )
        self.guards.check(self.schedule)
        self._rank, self._evaluate, self._overwrite, self._strict = rank, evaluate, overwrite, strict
        self._folder = Path(folder) if folder is not None else None
        self.cycle: PredictExtendCycle | None = None
        super().__init__(None, self._after_step)  # the trainer is known when training begins

    @property
    def journal(self) -> Journal:
        """Every decision so far."""
        return self.cycle.journal if self.cycle is not None else Journal()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from next_backends.trl.backend import TrlBackend

        check_arguments(self.schedule, self.guards, state.max_steps, args)
        self.schedule.check_predictor(self._make(), state.max_steps)
        folder = self._folder or Path(args.output_dir) / "next-core"
        journal = folder / JOURNAL
        if state.global_step == 0 and journal.exists():
            if not self._overwrite:
                raise ConfigError(f"{folder} holds another run; resume it, pass folder= or overwrite=True")
            journal.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        backend = TrlBackend()
        probe = self._evaluate
        backend.attach(
            kwargs["model"], folder, None if probe is None else lambda model, split: {"accuracy": probe(model)}
        )
        backend.begin(state.global_step, kwargs["optimizer"])
        self._backend = backend
        self.cycle = PredictExtendCycle(
            backend,
            self._make,
            self.schedule,
            self.guards,
            state.max_steps,
            Journal(journal),
            rank=self._rank,
            strict=self._strict,
        )
        if state.global_step == 0:
            self.cycle.journal.append("start", 0, schedule=self.schedule.model_dump())
        else:
            self.cycle.resume(state.global_step)

    def _after_step(self, step: int) -> None:
        assert self.cycle is not None
        self.cycle.after_step(step)
        if step == self.cycle.total and (advice := self.cycle.advise(step)) is not None:
            logging.getLogger(__name__).warning(advice)


def _validated(model: type[Any], fields: Mapping[str, Any]) -> Any:
    try:
        return model(**fields)
    except ValidationError as error:
        raise ConfigError(explain(error, "PredictExtendCallback", model)) from None

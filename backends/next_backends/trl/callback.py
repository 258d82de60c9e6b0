"""The one line for a TRL script: a callback that watches the run, jumps, checks the jump, and lets training go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from next_backends.trl.argument_checks import check_arguments, check_whole
from next_backends.trl.processes import Change, Processes, adapters
from next_backends.trl.step_callback import StepCallback
from next_backends.trl.trl_backend import TrlBackend
from next_core.cycle.advice import journal_advice
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.diagnostics.learning_rate import run_advice
from next_core.errors import ConfigError
from next_core.live_weights.in_memory import activate_jumps, is_peft
from next_core.plugins import make_predictor
from next_core.predictor import TrajectoryPredictor
from next_core.process.containment import same_random_states
from next_core.run_config import DEFAULT_PREDICTOR, Guards, Schedule
from next_core.settings import explain
from next_core.storage.locking import hold, release


class PredictExtendCallback(StepCallback):
    """Predict-extend for any existing ``GRPOTrainer`` or ``RLOOTrainer``; LoRA or full-parameter.

    ``predictor`` is a name, a mapping (``{"name": "secant", "window": 10}``), or a function that makes one;
    ``schedule`` fields (``observe``, ``every``, ``horizon``, ``alpha``, ``jump_every``, ``jumps``, ``settle``) and
    ``guards`` are those of the config file. ``evaluate(model) -> accuracy`` is the probe; without it the guards that
    need one do not run. Checkpoints, jumps and the journal go to ``folder``, by default ``<output_dir>/next-core``;
    ``resume_from_checkpoint`` takes them up from there. Raises ``ConfigError`` for settings that contradict each other
    or the trainer's, when training begins at the latest.

    In a data-parallel run every process makes the same callback. Process 0 decides, calls ``evaluate`` and writes; the
    others wait, and end each step with the same weights. ``cycle`` and ``journal`` are process 0's.
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
        recommended = self._make().recommended  # a wrong name or field is an error now, not 50 steps later
        self.schedule: Schedule = _validated(Schedule, {**recommended.get("schedule", {}), **schedule})
        given = {} if guards is None else guards
        self.guards: Guards = (
            given if isinstance(given, Guards) else _validated(Guards, {**recommended.get("guards", {}), **given})
        )
        self.guards.check(self.schedule)
        self._rank, self._evaluate, self._overwrite, self._strict = rank, evaluate, overwrite, strict
        self._folder = Path(folder) if folder is not None else None
        self.cycle: PredictExtendCycle | None = None
        self._processes = Processes()
        self._model: Any = None
        self._optimizer: Any = None
        self._late: Exception | None = None
        super().__init__(None, self._after_step)  # the trainer is known when training begins

    @property
    def journal(self) -> Journal:
        """Every decision so far."""
        return self.cycle.journal if self.cycle is not None else Journal()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise ConfigError(
                f"the checkpoint is of step {state.global_step}, the last of {state.max_steps}: nothing is left to "
                "train, and the trainer would take one step more; use its weights, or raise max_steps"
            )
        check_arguments(self.schedule, self.guards, state.max_steps, args, several=True)
        self.schedule.check_predictor(self._make(), state.max_steps)
        self._model, self._optimizer = kwargs["model"], kwargs["optimizer"]
        check_whole(self._model)
        self._late = None
        self._processes.close()  # of a training that failed
        self._processes = Processes(args.process_index, args.world_size, args.ddp_timeout)
        self._processes.check_settings(
            {**self.schedule.model_dump(), **self.guards.model_dump(), "max_steps": state.max_steps}
        )
        self._processes.first(lambda: self._begin(args, state), "when training began")
        if not self._processes.leads and is_peft(self._model):
            activate_jumps(self._model)  # of a resumed run; process 0 has done so
        self._processes.check_weights(self._model, f"when training began at step {state.global_step}")

    def _begin(self, args: Any, state: Any) -> None:
        """Process 0 alone: take up the folder, and the cycle."""
        folder = self._folder_of(args)
        hold(folder)
        journal = folder / JOURNAL
        if state.global_step == 0 and journal.exists():
            if not self._overwrite:
                raise ConfigError(f"{folder} holds another run; resume it, pass folder= or overwrite=True")
            journal.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        backend = TrlBackend()
        probe = self._evaluate
        backend.attach(self._model, folder, None if probe is None else lambda model, split: _measured(probe, model))
        backend.begin(state.global_step, self._optimizer)
        self._backend = backend
        self.cycle = PredictExtendCycle(
            backend,
            self._make,
            self.schedule,
            self._guards_while_others_wait(),
            state.max_steps,
            Journal(journal),
            rank=self._rank,
            strict=self._strict,
        )
        if state.global_step == 0:
            self.cycle.journal.append("start", 0, schedule=self.schedule.model_dump())
        else:
            self.cycle.resume(state.global_step)

    def _folder_of(self, args: Any) -> Path:
        return self._folder or Path(args.output_dir) / "next-core"

    def _guards_while_others_wait(self) -> Guards:
        """A fit that is too slow costs a jump, and not the run: the others wait for fit and probes together."""
        if self._processes.count == 1:
            return self.guards
        half = self._processes.timeout / 2
        return self.guards.model_copy(update={"time_limit": min(self.guards.time_limit or half, half)})

    def _after_step(self, step: int) -> None:
        where = f"after step {step}"
        if self.schedule.observes(step):
            self._processes.check_weights(self._model, where)
        change = self._processes.first(lambda: self._decide(step), where)
        self._processes.share(change, self._model, self._optimizer, where)

    def _decide(self, step: int) -> Change | None:
        """Process 0 alone: the cycle, and what it changed."""
        assert self.cycle is not None
        assert self._backend is not None
        before = adapters(self._model)
        self._backend.moved.clear()
        self._unless_late(self.cycle.after_step, step)
        if (
            step == self.cycle.total
            and (advice := journal_advice(run_advice, self._backend, self.journal, step)) is not None
        ):
            logging.getLogger(__name__).warning(advice)
        moved = self._backend.moved
        return Change.since(before, self._model, self._optimizer, "moments" in moved) if moved else None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        try:
            super().on_log(args, state, control, logs, **kwargs)
        except Exception as error:
            if self._processes.count == 1:
                raise
            self._late = error  # raised where the others hear of it: here they are not listening

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        where = f"at the checkpoint of step {state.global_step}"
        self._processes.barrier(where)  # each process writes a part of it
        saved = super().on_save
        self._processes.first(lambda: self._unless_late(saved, args, state, control), where)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended = super().on_train_end
        self._processes.first(lambda: self._unless_late(ended, args, state, control), "when training ended")
        self._processes.close()
        release(self._folder_of(args))

    def _unless_late(self, act: Callable[..., None], *arguments: Any) -> None:
        """Process 0 alone: ``act``, unless something that was logged since could not be written."""
        if self._late is not None:
            raise self._late
        act(*arguments)


def _measured(probe: Callable[[Any], float], model: Any) -> dict[str, float]:
    """A probe leaves no trace in training: random states, and what was in train or eval mode, are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with same_random_states():
            return {"accuracy": probe(model)}
    finally:
        for module, training in modes:
            module.training = training


def _validated(model: type[Any], fields: Mapping[str, Any]) -> Any:
    try:
        return model(**fields)
    except ValidationError as error:
        raise ConfigError(explain(error, "PredictExtendCallback", model)) from None

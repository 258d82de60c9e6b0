"""``PredictExtendCallback``: jumps in any TRL trainer by one more line."""

import datetime
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from next_backends.trl.argument_checks import check_arguments, check_jump_adapters, check_reachable
from next_backends.trl.earlier_run import make_room
from next_backends.trl.reward_probe import prompts_of, reward_probe
from next_backends.trl.shared_run import SharedRun
from next_backends.trl.step_callback import checkpoint_of, end_now
from next_backends.trl.trainer_log import trainer_of
from next_backends.trl.trl_backend import TrlBackend
from next_core.cli.status_command import show_end
from next_core.config import recommended_of, refuse_jump_settings
from next_core.cycle.journal import JOURNAL, Journal
from next_core.cycle.journal_advice import journal_advice
from next_core.cycle.loop import PredictExtendCycle
from next_core.diagnostics.learning_rate import run_advice
from next_core.errors import NextCoreError, contradiction, invalid_value
from next_core.plugins import PredictorLike, resolve_any_predictor, steps_or_jumps
from next_core.predictor import TrajectoryPredictor, described
from next_core.process.containment import same_random_states
from next_core.process.hardware import hardware, versions
from next_core.run_config import DEFAULT_PREDICTOR, Guards, Schedule
from next_core.settings import validated
from next_core.storage.locking import hold, release


class PredictExtendCallback(TrainerCallback):  # type: ignore[misc]
    """Predict-extend for any existing trainer of TRL or transformers, such as ``GRPOTrainer``; LoRA or full-parameter.

    ``predictor`` is a name, a mapping (``{"name": "secant", "window": 10}``), ``"module:Class"``, a class or an
    instance; ``schedule`` fields (``observe``, ``every``, ``horizon``, ``alpha``, ``alphas``, ``jump_every``,
    ``jumps``, ``settle``, ``average``) and ``guards`` are those of the config file. ``evaluate(model) -> accuracy`` is
    the probe; ``"reward"`` stands for the trainer's mean reward of greedy completions of its ``eval_dataset``, else of
    training prompts, which are held back. Without a probe the guards that need one do not run. Checkpoints, jumps and
    the journal go to ``folder``, by default ``<output_dir>/next-core``; ``resume_from_checkpoint`` continues from
    there. Raises ``ConfigError`` for settings that contradict each other or the trainer's, when training begins at the
    latest.

    In a data-parallel run every process makes the same callback. Process 0 decides, calls ``evaluate`` and writes; the
    others wait, and end each step with the same weights. Only process 0 has a ``cycle`` and a ``journal``.
    """

    def __init__(
        self,
        predictor: PredictorLike = DEFAULT_PREDICTOR,
        *,
        guards: Guards | Mapping[str, Any] | None = None,
        rank: int = 1,
        evaluate: Callable[[Any], float] | Literal["reward"] | None = None,
        folder: str | Path | None = None,
        overwrite: bool = False,
        strict: bool = False,
        **schedule: Any,
    ) -> None:
        if rank < 1:
            raise invalid_value(f"rank must be at least 1 (got {rank})")
        if not (evaluate is None or evaluate == "reward" or callable(evaluate)):
            raise invalid_value(f"evaluate is {evaluate!r}, not a function or 'reward'")
        if isinstance(predictor, str | Mapping):
            predictor = steps_or_jumps(predictor, TrlBackend)
        self._make_predictor = resolve_any_predictor(predictor)
        chosen = type(self._make_predictor())
        given = {"schedule": schedule, "guards": {} if isinstance(guards, Guards) else guards or {}}
        refuse_jump_settings(chosen, given)
        recommended, where = recommended_of(chosen, given), type(self).__name__
        self.schedule = validated(Schedule, {**recommended.get("schedule", {}), **schedule}, where)
        if not isinstance(guards, Guards):
            guards = validated(Guards, {**recommended.get("guards", {}), **(guards or {})}, where)
        self.guards = guards
        self.guards.check(self.schedule)
        self.backend = TrlBackend()
        self.cycle: PredictExtendCycle | None = None
        self._rank, self._overwrite, self._strict = rank, overwrite, strict
        self._given, self._evaluate = evaluate, evaluate if callable(evaluate) else None
        self._prompts: Any = None
        """What ``evaluate="reward"`` evaluates."""
        self._folder = None if folder is None else Path(folder)
        self._shared: SharedRun | None = None  # The other processes; None in a run of one process

    @property
    def journal(self) -> Journal:
        """Every decision so far."""
        return self.cycle.journal if self.cycle is not None else Journal()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = trainer_of(self)
        if self._given == "reward" and trainer is not None:
            self._prompts = prompts_of(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._shared is not None:
            self._shared.processes.close()  # a training that failed has left it open
        self.cycle = self._shared = None
        if not self._has_room(state):
            return
        self._check(args, state, kwargs["model"])
        trainer = self.backend.trainer = trainer_of(self)
        ours = [isinstance(one, PredictExtendCallback) for one in trainer.callback_handler.callbacks] if trainer else []
        if sum(ours) > 1:
            raise contradiction(
                "the trainer has several PredictExtendCallbacks: remove all but one (trainer.remove_callback)"
            )
        if self._given == "reward":
            if self._prompts is None:
                raise contradiction(
                    "evaluate='reward': give the callback to the trainer's constructor, in callbacks=[...]"
                )
            self._evaluate = reward_probe(self.backend.trainer, self._prompts)
        measure = None if self._evaluate is None else self._measure
        if args.world_size > 1:
            self._shared = SharedRun(args, self.backend, kwargs["model"])
        processes = None if self._shared is None else self._shared.processes
        self.backend.attach(kwargs["model"], self._folder_of(args), measure, processes)
        self.backend.connect(kwargs["optimizer"], args)
        if self._shared is None:
            self._begin(args, state, kwargs["model"], self.guards)
        else:
            settings = {**self.schedule.model_dump(), **self.guards.model_dump(), "max_steps": state.max_steps}
            guards = self._shared.bounded(self.guards)
            self._shared.begin(state.global_step, settings, self._begin, args, state, kwargs["model"], guards)
        if state.global_step == state.max_steps:
            if state.is_world_process_zero:
                logging.getLogger(__name__).warning("step %d is the last: nothing is left to train", state.global_step)
            end_now(self.backend.trainer, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._shared is not None:
            observes = self.schedule.observes(state.global_step)
            self._shared.end_step(state.global_step, observes, self._end_step)
        elif self.cycle is not None:
            self._end_step(state.global_step)
        self.backend.send_weights()  # a probe may have generated before the last change

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._shared is not None:
            self._shared.log(state.global_step, logs or {})
        elif self.cycle is not None:  # it is not when the trainer evaluates before training
            self.backend.log(state.global_step, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._shared is not None:
            self._shared.save(state.global_step, checkpoint_of(args, state))
        elif self.cycle is not None:
            self.backend.saved(checkpoint_of(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._shared is not None:
            self._shared.end()
            self._shared = None
        elif self.cycle is not None:
            self.backend.finish()
        if self.cycle is not None:
            if self.journal.records[-1]["event"] != "end":  # the trainer stopped early
                self.journal.append("end", state.global_step)
            if args.load_best_model_at_end and state.best_global_step is not None:
                self.journal.append("best", state.global_step, loaded=state.best_global_step)
            try:
                show_end(self._folder_of(args))
            except NextCoreError as error:  # the training has ended well all the same
                logging.getLogger(__name__).warning("there is no summary: %s", error)
        self.backend.trainer = None
        release(self._folder_of(args))

    def _folder_of(self, args: Any) -> Path:
        return self._folder or Path(args.output_dir) / "next-core"

    def _has_room(self, state: Any) -> bool:
        """Whether a jump fits into the run; without one, as in a short trial of a script, the trainer runs plainly."""
        jumps = isinstance(self._make_predictor(), TrajectoryPredictor)
        if not jumps or self.schedule.attempt_steps(state.max_steps):
            return True
        if state.is_world_process_zero:
            logging.getLogger(__name__).warning(
                "no jump fits into %d steps (observe %d, settle %d): this training runs without next-core",
                state.max_steps, self.schedule.observe, self.schedule.settle,
            )  # fmt: skip
        return False

    def _check(self, args: Any, state: Any, model: Any) -> None:
        """Raise ``ConfigError`` or ``BackendError`` for a training that cannot jump; changes nothing."""
        if state.global_step > state.max_steps:
            raise contradiction(
                f"the checkpoint is of step {state.global_step}, after the last of {state.max_steps}: resume from an "
                "earlier one, or raise max_steps"
            )
        predictor = self._make_predictor()
        check_arguments(predictor, self.schedule, self.guards, state.max_steps, args, several=True)
        if isinstance(predictor, TrajectoryPredictor):
            self.schedule.check_predictor(predictor, state.max_steps)
        check_jump_adapters(args, predictor, model)
        check_reachable(model)

    def _begin(self, args: Any, state: Any, model: Any, guards: Guards) -> None:
        """Start or resume the history in the folder, and make the cycle."""
        folder = self._folder_of(args)
        hold(folder)
        journal = folder / JOURNAL
        started = {
            "steps": state.max_steps,
            "predictor": described(self._make_predictor()),
            "schedule": self.schedule.model_dump(mode="json"),
            "guards": self.guards.model_dump(mode="json"),
        }
        if state.global_step == 0 and self._overwrite:
            journal.unlink(missing_ok=True)
        elif state.global_step == 0:
            make_room(folder, started, Path(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.cycle = PredictExtendCycle(
            self.backend,
            self._make_predictor,
            self.schedule,
            guards,
            state.max_steps,
            Journal(journal),
            rank=self._rank,
            strict=self._strict,
        )
        self.backend.begin(state.global_step, checkpoint_of(args, state))
        if state.global_step == 0:
            self.cycle.journal.append("start", 0, **started, about=_about(args, model, self.backend.trainer))
        else:
            self.cycle.resume(state.global_step)

    def _end_step(self, step: int) -> None:
        assert self.cycle is not None
        self.cycle.after_step(step)
        if step == self.cycle.total:
            journal_advice(self.cycle, run_advice, step)
            self.journal.append("end", step)

    def _measure(self, model: Any, split: str) -> dict[str, float]:
        """Call the user's probe without a trace in training: random states and train or eval modes are put back."""
        assert self._evaluate is not None
        modes = [(module, module.training) for module in model.modules()]
        try:
            with same_random_states():
                return {"accuracy": self._evaluate(model)}
        finally:
            for module, training in modes:
                module.training = training


def _about(args: Any, model: Any, trainer: Any) -> dict[str, Any]:
    """Return what a report says about a training: model, task, learning rate, rollouts a step, machine and date."""
    dataset = getattr(getattr(getattr(trainer, "train_dataset", None), "info", None), "dataset_name", None)
    return {
        "date": datetime.date.today().isoformat(),
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "task": dataset or ", ".join(getattr(trainer, "reward_func_names", ())) or None,
        "algorithm": type(trainer).__name__.removesuffix("Trainer").lower(),
        "learning_rate": args.learning_rate,
        "rollouts": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "hardware": hardware(),
        "versions": versions(),
    }

"""TRL's GRPO and RLOO trainers as the predict-extend cycle sees them: a live model, observed and moved in place."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from next_backends.history_folder import numbered
from next_backends.sharding import sharded_by_dtensor, trained_weights
from next_backends.trl.argument_checks import batches_of_a_generation, check_precision
from next_backends.trl.evaluate import averaged
from next_backends.trl.live_history import LiveHistory, TrlApplied
from next_backends.trl.logged_rewards import LoggedRewards
from next_core.backend import Backend, LoggedReward
from next_core.cycle.decisions import PREFIX
from next_core.errors import CheckpointError, trainer_failed, unsupported
from next_core.interfaces import Applied, Prediction
from next_core.live_weights.frozen_adapters import FACTORS_INSTEAD, is_peft, rehearse_adapter
from next_core.live_weights.in_memory import InMemoryApplier
from next_core.live_weights.live_model import LiveModel
from next_core.live_weights.optimizer_steps import OptimizerSteps
from next_core.live_weights.processes import Processes, everywhere
from next_core.run_config import Choice, RunConfig
from next_core.settings import Settings
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.full_model import FullModelSource
from next_core.sources.metrics import METRICS, by_step, read_log
from next_core.types import Space


class TrlConfig(Settings):
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of TRL's GRPOConfig or RLOOConfig, passed through"
    )
    optimizer: Choice | None = Field(
        None,
        description="An optimizer instead of AdamW, for runs without jumps: module:Class with its settings; "
        "`training.learning_rate` is its lr",
    )


class TrlBackend(Backend):
    """Built from a config by ``prepare``, or attached to a running trainer's model by ``attach``."""

    name = "trl"
    config_class = TrlConfig
    exact_resume = True
    scales_steps = True
    forgets = True

    def __init__(self, config: TrlConfig | None = None) -> None:
        super().__init__(config)
        self.trainer: Any = None
        self.processes: Processes | None = None
        """The processes of a run that has several."""
        self._model: Any = None
        self._optimizer: Any = None
        self._live: LiveModel | None = None
        self._history = LiveHistory(None, Path())
        self._evaluate: Callable[[Any, str], Mapping[str, float]] | None = None
        self._resume_from: Path | None = None
        self._stopping = False
        self._notes: list[str] = []
        self._windows: Sequence[int] | None = None
        self._steps: OptimizerSteps | None = None
        self._args: Any = None
        self._rewards = LoggedRewards()

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Build model, LoRA, data, reward and trainer. Returns the step to resume at. Raises ``ConfigError``."""
        from next_backends.trl.build import build_trainer, last_checkpoint

        self.trainer, self._evaluate = build_trainer(run, self.config.args, out / "trainer", self.config.optimizer)
        self.attach(self.trainer.model, out)
        if not resume:
            return 0
        broken = self._history.folder.first_damaged()
        self._resume_from, step, self._notes = last_checkpoint(out / "trainer", None if broken is None else broken[0])
        problem = broken[1] if broken is not None else next(iter(self._notes), None)
        if problem and step == 0 and numbered(out / "trainer", "checkpoint-*"):  # the run would start from scratch
            raise CheckpointError(
                f"{problem}. The trainer has saved no intact state before it: --overwrite starts the run again",
                kind="checkpoint-damaged",
            )
        if broken is not None:
            self._history.folder.forget_after(step)
            self._notes.append(f"{broken[1]}; the run was resumed at step {step}, before it")
        return step

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def check_jumps(self, space: Space | None) -> None:
        if not is_peft(self._model):
            return
        kinds = {str(config.peft_type.value) for config in self._model.peft_config.values()}
        if kinds != {"LORA"}:
            raise unsupported(
                f"the model trains {' and '.join(sorted(kinds))}, and jumps need LoRA or full parameters; use "
                "predictor='auto', which makes none"
            )
        if space != "factors" and sharded_by_dtensor(self._model):
            raise unsupported(
                "FSDP2 takes no jump adapter next to the trained one, which a jump in merged space needs: "
                f"{FACTORS_INSTEAD}"
            )
        if space == "merged":
            self._rehearse()

    @everywhere
    def _rehearse(self) -> None:
        rehearse_adapter(self._model)

    def attach(
        self,
        model: nn.Module,
        folder: Path,
        evaluate: Callable[[Any, str], Mapping[str, float]] | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Use a live model, and ``folder`` for checkpoints, jumps and metrics. Nothing is written yet.

        Every one of several ``processes`` has a backend, and process 0's is driven.
        """
        self._model, self._history = model, LiveHistory(model, folder)
        self._evaluate = evaluate or self._evaluate
        self._live, self.processes = None, processes
        if processes is not None:
            processes.register(self)

    def follow_steps(self, windows: Sequence[int]) -> None:
        self._windows = windows

    @property
    def follows_steps(self) -> bool:
        """Whether steps are followed now."""
        return self._steps is not None

    @property
    def steps(self) -> OptimizerSteps:
        assert self._steps is not None  # follow_steps was called before training began
        return self._steps

    def connect(self, optimizer: Any, args: Any) -> None:
        """Find the trained weights and the optimizer's state. Called in every process before ``begin``.

        ``args`` are the trainer's. Raises ``ConfigError``, ``BackendError``.
        """
        self._optimizer, self._args, self._rewards = optimizer, args, LoggedRewards()
        weights = trained_weights(self._model, optimizer, self.processes)
        note = check_precision([shard.tensor.dtype for shard in weights.shards], is_peft(self._model))
        if note is not None:
            self._note(note)
        self._live = self._history.live = LiveModel(self._model, weights, self.processes)

    def begin(self, step: int, checkpoint: Path) -> None:
        """Keep the starting point of a training that begins, or the history of one that is resumed.

        ``checkpoint`` is the folder of the trainer's checkpoint at ``step``. Everything is checked before anything is
        removed. Raises ``ConfigError``, ``BackendError``, ``CheckpointError``.
        """
        if self._windows is not None:
            self._begin_steps(step, checkpoint)
            return
        self._history.begin(step, checkpoint)

    def _begin_steps(self, step: int, checkpoint: Path) -> None:
        """Follow the optimizer's steps, from the state in the trainer's checkpoint if the run is resumed."""
        self._follow(tuple(self._windows or ()), checkpoint if step > 0 else None)
        if step > 0:
            note = self.steps.replace_lost(step)
            if note is not None:
                self._note(note)
            for logged, numbers in sorted(by_step(read_log(self._history.folder.path / METRICS)).items()):
                if logged <= step:
                    self._rewards.add(logged, numbers, self._args)
        else:
            self._history.folder.clear()
            self.steps.keep(0)

    def _note(self, note: str) -> None:
        self._notes.append(note)
        logging.getLogger(__name__).warning(note)

    @everywhere
    def _follow(self, windows: tuple[int, ...], checkpoint: Path | None) -> None:
        self.close_steps()
        steps = OptimizerSteps(self.live.weights, self._history.folder.kept, windows, self.processes)
        if checkpoint is not None:
            steps.load(checkpoint)
        self._steps = steps

    @property
    def live(self) -> LiveModel:
        assert self._live is not None  # connect was called before training began
        return self._live

    def close_steps(self) -> None:
        """Leave the optimizer as it was."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        from next_backends.trl.step_callback import StepCallback

        callback = StepCallback(self, step_ended)
        self.trainer.add_callback(callback)
        try:
            self.trainer.train(resume_from_checkpoint=str(self._resume_from) if self._resume_from else None)
        finally:
            self.trainer.remove_callback(callback)
        if self.trainer.state.global_step < until and not self._stopping:
            raise trainer_failed(
                f"training ended at step {self.trainer.state.global_step} of {until}; does `args` shorten it?"
            )

    def stop(self) -> None:
        self._stopping = True

    def ends_after(self, step: int) -> bool:
        """Whether training should end here: ``stop`` was called, and no roll-outs are left over."""
        return self._stopping and self.takes_weights(step)

    def observe(self, step: int) -> None:
        self._history.observe(step)

    def saved(self, checkpoint: Path) -> None:
        """Complete a checkpoint that the trainer has written."""
        if self._steps is not None:
            self._steps.save(checkpoint)
        self._history.seal(checkpoint)

    def finish(self) -> None:
        """Wait for what is being written, and leave the optimizer as it was. Raises an error of the former."""
        try:
            self.flush()
        finally:
            self.close_steps()

    def flush(self) -> None:
        """Wait for the checkpoint that is being written or sealed. Raises its error."""
        self._history.flush()

    def source(self) -> PeftAdapterSource | FullModelSource:
        return self._history.source()

    def forget(self, step: int, kept: Callable[[int, Sequence[int]], Sequence[range]]) -> None:
        output = Path(self._args.output_dir)
        self._history.forget(lambda: kept(step, [at for at, _ in numbered(output, "checkpoint-*")]))

    def reopen(self, steps: range, every: int) -> None:
        self._history.folder.reopen(steps, every)

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> TrlApplied:
        folder = self._history.folder.next_jump()  # a damaged history is found before anything moves
        made = InMemoryApplier().apply(prediction, alpha, out=self._history.live)
        return self._history.record(folder, prediction.step, alpha, made, keep)

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, TrlApplied)
        applied.rollback()
        self._history.folder.withdraw(applied.folder, step)

    def active_jump(self, step: int) -> Applied | None:
        return self._history.made_at(step)

    @property
    def measures(self) -> bool:
        return self._evaluate is not None

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        return next(iter(self.accuracies(split).values()), None)

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        if self._evaluate is None:
            return {}
        together = self._live is not None and self._live.weights.forward_needs_all
        return self._measure_together(split) if together else self._measure(split)

    @everywhere
    def _measure_together(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        inner = [self._model.get_base_model()] if is_peft(self._model) else []  # what generates
        try:
            with self.processes.in_step([self._model, *inner]) if self.processes else contextlib.nullcontext():
                return self._measure(split)
        finally:
            self.live.weights.after_evaluation()

    def _measure(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        assert self._evaluate is not None
        self.send_weights()
        with averaged(self._optimizer):
            return self._evaluate(self._model, split)

    def send_weights(self) -> None:
        """Let TRL send vLLM the weights before it generates next, although it has sent some at this step already."""
        if hasattr(self.trainer, "_last_loaded_step"):
            self.trainer._last_loaded_step = -1

    def log(self, step: int, logs: Mapping[str, Any]) -> None:
        """Write what the trainer logs, for predictors that read a metric; decisions are in the journal."""
        if any(key.startswith(PREFIX) for key in logs):
            return
        self._history.folder.log(step, logs)
        self._rewards.add(step, logs, self._args)

    def show(self, figures: Mapping[str, float]) -> None:
        if self.trainer is not None:
            from next_backends.trl.trainer_log import log_figures

            log_figures(self.trainer, figures)

    def rewards(self) -> Sequence[LoggedReward]:
        return self._rewards

    def takes_weights(self, step: int) -> bool:
        # TRL counts micro-batches, and generates first when it resumes. An epoch may end with fewer of them in a step.
        done = getattr(self.trainer, "_step", step * self._args.gradient_accumulation_steps)
        return int(done) % batches_of_a_generation(self._args) == 0

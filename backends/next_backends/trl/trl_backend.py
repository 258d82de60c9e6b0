"""TRL's GRPO and RLOO trainers as the predict-extend cycle sees them: a live model, observed and moved in place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import nn

from next_backends.history_folder import HistoryFolder, JumpAdapter, numbered
from next_backends.sharding import sharded_by_dtensor, trained_weights
from next_backends.trl.applied_jump import TrlApplied
from next_backends.trl.argument_checks import check_precision, steps_of_a_generation
from next_backends.trl.evaluate import averaged
from next_backends.trl.logged_rewards import LoggedRewards
from next_backends.trl.tensors import adapter_config, jump_tensors, live_tensors, write_checkpoint
from next_core.backend import Backend, LoggedReward
from next_core.cycle.decisions import PREFIX
from next_core.errors import BackendError, CheckpointError
from next_core.interfaces import Applied, Prediction
from next_core.live_weights.frozen_adapters import (
    FACTORS_INSTEAD,
    activate_jumps,
    add_saved_adapter,
    is_peft,
    jump_adapters,
    rehearse_adapter,
    trained_adapter,
)
from next_core.live_weights.in_memory import InMemoryApplier
from next_core.live_weights.live_model import LiveModel, kept_file
from next_core.live_weights.optimizer_steps import OptimizerSteps
from next_core.live_weights.processes import Processes, everywhere
from next_core.run_config import Choice, RunConfig
from next_core.settings import Settings
from next_core.sources.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from next_core.sources.adapter_source import PeftAdapterSource, PeftAdapterSourceConfig
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from next_core.sources.metrics import METRICS, by_step, read_log
from next_core.sources.tensor_files import read_json
from next_core.storage.atomic import seal, sweep
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
        self._history = HistoryFolder(Path())
        self._source: PeftAdapterSource | FullModelSource | None = None
        self._evaluate: Callable[[Any, str], Mapping[str, float]] | None = None
        self._resume_from: Path | None = None
        self._stopping = False
        self._notes: list[str] = []
        self._windows: Sequence[int] | None = None
        self._steps: OptimizerSteps | None = None
        self._args: Any = None
        self._rewards = LoggedRewards()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-core-checkpoint")
        self._writing: Future[None] | None = None
        self._forget: Callable[[], None] | None = None
        """Deletes what is not needed after the last checkpoint."""

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Build model, LoRA, data, reward and trainer. Returns the step to resume at. Raises ``ConfigError``."""
        from next_backends.trl.build import build_trainer, last_checkpoint

        self.trainer, self._evaluate = build_trainer(run, self.config.args, out / "trainer", self.config.optimizer)
        self.attach(self.trainer.model, out)
        if not resume:
            return 0
        for folder in (self._history.checkpoints, self._history.jumps):
            sweep(folder)  # what a killed process was writing is not damage
        broken = self._history.first_damaged()
        self._resume_from, step, self._notes = last_checkpoint(out / "trainer", None if broken is None else broken[0])
        if broken is not None:
            self._history.forget_after(step)
            self._notes.append(f"{broken[1]}; the run was resumed at step {step}, before it")
        return step

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def check_jumps(self, space: Space | None) -> None:
        if not is_peft(self._model):
            return
        if space != "factors" and sharded_by_dtensor(self._model):
            raise BackendError(
                "FSDP2 takes no jump adapter next to the trained one, which a jump in merged space needs: "
                f"{FACTORS_INSTEAD}",
                kind="backend-unsupported",
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
        self._model, self._history, self._source = model, HistoryFolder(folder), None
        self._writing = None  # what an earlier training failed to write is that training's error
        self._forget = None
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
            self._notes.append(note)
            logging.getLogger(__name__).warning(note)
        self._live = LiveModel(self._model, weights, self.processes)

    def begin(self, step: int, checkpoint: Path) -> None:
        """Keep the starting point of a training that begins, or the history of one that is resumed.

        ``checkpoint`` is the folder of the trainer's checkpoint at ``step``. Everything is checked before anything is
        removed. Raises ``ConfigError``, ``BackendError``, ``CheckpointError``.
        """
        if self._windows is not None:
            self._begin_steps(step, checkpoint)
            return
        if step > 0:
            self._check_resume(step)
            self._history.forget_after(step)
            self._source = None
        elif is_peft(self._model) and jump_adapters(self._model):
            raise BackendError(
                "the model holds jump adapters of an earlier training; make a new model, or resume from a checkpoint",
                kind="backend-unsupported",
            )
        else:
            self._history.clear()
            self.observe(0)
        self.source()  # what cannot be read back (DoRA, no linear layer) fails now, not at the first jump

    def _begin_steps(self, step: int, checkpoint: Path) -> None:
        """Follow the optimizer's steps, from the state in the trainer's checkpoint if the run is resumed."""
        self._follow(tuple(self._windows or ()), checkpoint if step > 0 else None)
        if step > 0:
            for logged, numbers in sorted(by_step(read_log(self._history.path / METRICS)).items()):
                if logged <= step:
                    self._rewards.add(logged, numbers, self._args)
        else:
            self._history.clear()
            self.steps.keep(0)

    @everywhere
    def _follow(self, windows: tuple[int, ...], checkpoint: Path | None) -> None:
        self.close_steps()
        steps = OptimizerSteps(self.live.weights, windows, self.processes)
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

    def _check_resume(self, step: int) -> None:
        """Raise ``CheckpointError`` unless the trainer's checkpoint and this folder are of one run."""
        folder = self._history.path
        if not self._history.checkpoints.is_dir():
            raise CheckpointError(
                f"{folder} holds no history: this run was not observed from its start; resume it without jumps",
                kind="checkpoint-no-history",
            )
        self._restore_adapters(step)
        if not self._history.checkpoint(step).is_dir():
            return
        source = self._open()
        for name, live in live_tensors(self.live).items():
            stored = source.stored(name, step)
            if stored.shape != live.shape or not torch.allclose(live.float(), stored, atol=1e-6, rtol=1e-5):
                raise CheckpointError(
                    f"resuming at step {step}: '{name}' differs from what {folder} holds for that step; the trainer's "
                    "checkpoint is of another run",
                    kind="checkpoint-other-model",
                )

    def _restore_adapters(self, step: int) -> None:
        """Make the jump adapters of ``step`` active. DeepSpeed brings none back: they are read from our folder."""
        expected = self._history.active_adapters(step)
        found = self.live.change_adapters(activate_jumps) if is_peft(self._model) else []
        if found != [*expected] and (found or self.live.weights.resumes_adapters):
            raise CheckpointError(
                f"resuming at step {step}: {self._history.path} records the jump adapters {[*expected]}, but the "
                f"trainer's checkpoint holds {found or 'none'}; resume from a checkpoint of this run",
                kind="checkpoint-other-model",
            )
        for name in expected if not found else ():
            config, tensors = read_json(expected[name] / CONFIG_FILE), load_file(expected[name] / WEIGHTS_FILE)
            self.live.change_adapters(add_saved_adapter, name, config, tensors)

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        from next_backends.trl.step_callback import RunIsOver, StepCallback

        callback = StepCallback(self, step_ended)
        self.trainer.add_callback(callback)
        try:
            with contextlib.suppress(RunIsOver):
                self.trainer.train(resume_from_checkpoint=str(self._resume_from) if self._resume_from else None)
        finally:
            self.trainer.remove_callback(callback)
        if self.trainer.state.global_step < until and not self._stopping:
            raise BackendError(
                f"training ended at step {self.trainer.state.global_step} of {until}; does `args` shorten it?",
                kind="backend-failed",
            )

    def stop(self) -> None:
        self._stopping = True

    def ends_after(self, step: int, args: Any) -> bool:
        """Whether training should end here: ``stop`` was called, and no roll-outs are left over."""
        return self._stopping and step % steps_of_a_generation(args) == 0

    def observe(self, step: int) -> None:
        """Copy the trained tensors now, and write them while training goes on."""
        config = adapter_config(self._model, trained_adapter(self._model)) if is_peft(self._model) else None
        tensors = {name: value.contiguous() for name, value in live_tensors(self.live).items()}
        self.flush()
        self._writing = self._writer.submit(write_checkpoint, self._history.checkpoint(step), tensors, config)
        if isinstance(self._source, PeftAdapterSource):
            self._source.remember(step, tensors)

    def saved(self, checkpoint: Path) -> None:
        """Seal a checkpoint that the trainer has written, while training goes on; what was observed comes first."""
        if self._steps is not None:
            self._steps.save(checkpoint)
        self.flush()
        if self._forget is not None:
            self._forget()  # the trainer may have deleted an older checkpoint
        self._writing = self._writer.submit(_seal, checkpoint)

    def finish(self) -> None:
        """Leave the optimizer as it was, and wait for what is being written. Raises its error."""
        self.close_steps()
        self.flush()

    def flush(self) -> None:
        """Wait for the checkpoint that is being written or sealed. Raises its error."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def source(self) -> PeftAdapterSource | FullModelSource:
        self.flush()
        if self._source is None:
            self._source = self._open()
        else:
            self._source.refresh()
        return self._source

    def _open(self) -> PeftAdapterSource | FullModelSource:
        if is_peft(self._model):
            return PeftAdapterSource(PeftAdapterSourceConfig(path=self._history.checkpoints))
        return FullModelSource(FullModelSourceConfig(path=self._history.checkpoints))

    def forget(self, step: int, kept: Callable[[int, Sequence[int]], Sequence[range]]) -> None:
        self._forget = partial(self.forget, step, kept)
        saves = [at for at, _ in numbered(Path(self._args.output_dir), "checkpoint-*")]
        self._history.keep(kept(step, saves))

    def reopen(self, steps: range, every: int) -> None:
        self._history.reopen(steps, every)

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> TrlApplied:
        folder = self._history.next_jump()  # a damaged history is found before anything moves
        made = InMemoryApplier().apply(prediction, alpha, out=self.live)
        try:
            self._history.write_jump(
                folder,
                prediction.step,
                alpha,
                shift=made.shift,
                adapter=None if made.adapter is None else self._jump_adapter(made.adapter),
                more=(lambda there: self.live.save_kept(made.kept, there)) if keep else None,
            )
        except BaseException:
            made.rollback()
            raise
        return TrlApplied(self.live, folder, made, made.adapter)

    def _jump_adapter(self, name: str) -> JumpAdapter:
        tensors = {key: value.cpu().contiguous() for key, value in jump_tensors(self._model, name).items()}
        return JumpAdapter(name, adapter_config(self._model, name), tensors)

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, TrlApplied)
        applied.rollback()
        self._history.withdraw(applied.folder, step)

    def active_jump(self, step: int) -> Applied | None:
        made = self._history.jump_at(step)
        if made is None or not kept_file(made[0], 0).exists():
            return None
        return TrlApplied(self.live, made[0], None, made[1]["adapter"])

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        return next(iter(self.accuracies(split).values()), None)

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        if self._evaluate is None:
            return {}
        together = self._live is not None and self._live.weights.forward_needs_all
        return self._measure_together(split) if together else self._measure(split)

    @everywhere
    def _measure_together(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        return self._measure(split)

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
        self._history.log(step, logs)
        self._rewards.add(step, logs, self._args)

    def show(self, figures: Mapping[str, float]) -> None:
        if self.trainer is not None:
            from next_backends.trl.trainer_log import log_figures

            log_figures(self.trainer, figures)

    def rewards(self) -> Sequence[LoggedReward]:
        return self._rewards

    def takes_weights(self, step: int) -> bool:
        return step % steps_of_a_generation(self._args) == 0


def _seal(checkpoint: Path) -> None:
    for scrap in checkpoint.glob(".tmp*"):  # of a process that was killed while safetensors wrote into this folder
        scrap.unlink(missing_ok=True)
    try:
        seal(checkpoint)
    except OSError:
        if checkpoint.is_dir():  # otherwise the trainer, which keeps only the newest, has removed it
            raise

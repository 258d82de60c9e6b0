"""A trainer in an environment of its own, which pauses and takes new weights: what OpenRLHF and verl have in common."""

from __future__ import annotations

import contextlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from next_backends.external.remote_steps import RemoteSteps
from next_backends.external.trainer import Trainer
from next_backends.external.trainer_setup import TrainerSetup
from next_backends.history_folder import JumpAdapter
from next_core.appliers.jump_adapter import adapter_settings, adapter_tensors
from next_core.backend import Backend, LoggedReward
from next_core.errors import describe, trainer_failed, trainer_lost, unsupported
from next_core.interfaces import Applied, Prediction
from next_core.interfaces.prediction import weight_deltas
from next_core.interfaces.weight_delta import FactorStep
from next_core.live_weights.live_model import kept_file
from next_core.mathematics.low_rank import LowRank, dense
from next_core.run_config import RunConfig
from next_core.settings import Settings
from next_core.sources.adapter_source import ADAPTER, PeftAdapterSource
from next_core.sources.adapter_tensors import shift_keys
from next_core.sources.full_model import FullModelSource
from next_core.sources.jumps import SHIFT_FILE, jump_folders, jump_records
from next_core.sources.layouts import JUMP_PREFIX
from next_core.storage.atomic import new_directory, remove_directory
from next_core.storage.manifest import check_manifest


class ExternalBackend(Backend):
    """Drives a trainer through a ``Trainer`` object; nothing of its library is imported here."""

    in_process = False
    scales_steps = True
    setup_class: ClassVar[type[TrainerSetup]]
    program: ClassVar[str]  # The trainer's own command line, as Python finds it

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self._setup: TrainerSetup
        self._trainer: Trainer | None = None
        self._resumed: tuple[int, int] | None = None
        """Where the trainer began that is resumed, and the step to resume at."""
        self._at = 0
        self._steps: RemoteSteps | None = None
        self._open = contextlib.ExitStack()

    @abstractmethod
    def check_options(self) -> None:
        """Have the trainer's own parser check its options. Raises ``ConfigError`` with its message."""

    @abstractmethod
    def resume_point(self) -> tuple[int, int] | None:
        """Return where the trainer to resume began and the step to resume at; None if nothing was saved."""

    @abstractmethod
    def continue_from(self, begun: int, step: int) -> None:
        """Start a trainer that resumes at ``step`` the run of one that began at ``begun``."""

    @abstractmethod
    def state_of(self, begun: int, step: int) -> Path:
        """Return the folder in a state of the trainer's that holds the state of step scaling."""

    @abstractmethod
    def generated(self, split: str) -> float:
        """Return the mean reward of greedy completions of a split."""

    def continue_with_jump(self, step: int) -> None:
        """Let the trainer continue from ``step`` and the jump that was made there."""
        self._load(step)

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Check all that needs no GPU, by the trainer's own parser too. The trainer starts later."""
        self._setup = setup = self.setup_class(run, self.config, out)
        self._open.callback(setup.close)
        self._open.callback(self._end)
        setup.serve_rewards()
        self.check_options()
        if not resume:
            setup.history.clear()
            return 0
        self._resumed = self.resume_point()
        if self._resumed is not None:
            self._at = self._resumed[1]
            for path, record, _ in jump_records(setup.history.jumps):
                if record["step"] == self._at or (record["adapter"] and record["step"] < self._at):
                    check_manifest(path, contents=True)  # the trainer may load its files
            setup.history.forget_after(self._at)
            setup.read_rewards(self._at)
        return self._at

    def start(self) -> None:
        """Start the trainer: a new one, whose initial weights are kept, or one that resumes."""
        if self._resumed is not None:
            self.continue_from(*self._resumed)
            if self._running.step != self._at:
                raise trainer_failed(f"the trainer resumed from step {self._running.step}, not {self._at}")
            return
        self._setup.write_prompts(0)
        self._trainer = Trainer(self._setup, 0)
        if not self._setup.scales:
            self.observe(0)
            self.source()  # raises now, and not at the first jump, if it cannot be read back

    def follow_steps(self, windows: Sequence[int]) -> None:
        begun, step = self._resumed or (0, 0)
        state = self.state_of(begun, step) if step else None
        self._steps = RemoteSteps(self._running, windows, self._setup.history.kept, step, state)
        if self._steps.note is not None:
            logging.getLogger(__name__).warning(self._steps.note)

    @property
    def steps(self) -> RemoteSteps:
        assert self._steps is not None  # follow_steps was called before training began
        return self._steps

    def rewards(self) -> Sequence[LoggedReward]:
        return self._setup.logged

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        self._setup.step_ended = step_ended
        if self._running.step < until:
            self._running.train(until)
        self._at = until

    def observe(self, step: int) -> None:
        with new_directory(self._setup.history.checkpoint(step), overwrite=True) as folder:
            self._running.ask("save", folder=str(folder))

    def source(self) -> PeftAdapterSource | FullModelSource:
        return self._setup.history.source(lora=self._setup.run.training.lora is not None)

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> JumpApplied:
        step, history = prediction.step, self._setup.history
        folder = history.next_jump()
        shift, frozen = split_updates(prediction, alpha, lora=self._setup.run.training.lora is not None)
        adapter = None
        if frozen:
            settings = adapter_settings(frozen) | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
            adapter = JumpAdapter(f"{JUMP_PREFIX}{int(folder.name)}", json.dumps(settings), adapter_tensors(frozen))
        history.write_jump(folder, step, alpha, shift=shift, adapter=adapter, more=self._keep if keep else None)
        try:
            self.continue_with_jump(step)
        except BaseException as error:
            remove_directory(folder)
            try:
                self._load(step)
            except Exception as again:
                error.add_note(f"the weights from before the jump could not be restored either: {describe(again)}")
                self._abandon()
            raise
        return JumpApplied(self, folder, step)

    def rollback(self, applied: Applied, step: int) -> None:
        """Restore the weights, and after further steps the moments if they were kept.

        A trainer that was restarted for the jump continues with its fresh moments if no step has ended since.
        """
        assert isinstance(applied, JumpApplied)
        kept = step != applied.step and kept_file(applied.folder, 0).exists()
        self._setup.history.withdraw(applied.folder, step)
        if kept:
            self._running.ask("restore", folder=str(applied.folder), adapters=self._adapters())
        else:
            self._load(applied.step)

    @property
    def step(self) -> int:
        """The last step that ended."""
        return self._at

    def active_jump(self, step: int) -> Applied | None:
        found = self._setup.history.jump_at(step)
        return JumpApplied(self, found[0], step) if found and kept_file(found[0], 0).exists() else None

    @property
    def measures(self) -> bool:
        return self._setup.splits.get("validation") is not None

    def evaluate(self, split: str = "validation") -> float | None:
        rows = self._setup.splits.get(split)
        if rows is None:
            return None
        if self._setup.run.training.evaluation == "generate":
            return self.generated(split)
        return float(self._running.ask("likelihood", pairs=[[row["prompt"], str(row["answer"])] for row in rows]))

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        found = self.evaluate(split)
        sampled = self._setup.run.training.evaluation == "likelihood"
        return {} if found is None else {"sampled" if sampled else "greedy": found}

    @property
    def notes(self) -> Sequence[str]:
        return [] if self._steps is None or self._steps.note is None else [self._steps.note]

    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        return {"command line": [self.program, *self.setup_class(run, self.config, out).options(0)]}

    def close(self) -> None:
        self._open.close()

    @property
    def _running(self) -> Trainer:
        if self._trainer is None:
            raise trainer_lost("no trainer is running: it was ended or has failed")
        return self._trainer

    def _load(self, step: int, schedule: int = 0) -> None:
        """Load a checkpoint and the jumps made at its step into the trainer."""
        jumps = (path / SHIFT_FILE for path, jump in jump_folders(self._setup.history.jumps) if jump["step"] == step)
        self._running.ask(
            "load",
            folder=str(self._setup.history.checkpoint(step)),
            shifts=[str(file) for file in jumps if file.exists()],
            adapters=self._adapters(),
            schedule=schedule,
        )

    def _adapters(self) -> list[str]:
        """Return the adapters of the active jumps."""
        return [str(path / ADAPTER) for path, jump in jump_folders(self._setup.history.jumps) if jump["adapter"]]

    def _keep(self, folder: Path) -> None:
        self._running.ask("keep", folder=str(folder))

    def _abandon(self) -> None:
        """End the trainer; nothing continues from its weights."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.kill()

    def _end(self) -> None:
        """End the trainer. At the end of the run it saves its model first."""
        trainer = self._trainer
        if trainer is not None and trainer.paused and trainer.step == self._setup.run.steps:
            self._trainer = None
            trainer.finish()
            remove_directory(self._setup.history.kept)  # a finished run returns to no earlier state
        self._abandon()


class JumpApplied(Applied):
    """A jump that can be rolled back from the files in the run folder."""

    def __init__(self, backend: ExternalBackend, folder: Path, step: int) -> None:
        self._backend, self.folder, self.step = backend, folder, step

    def rollback(self) -> None:
        self._backend.rollback(self, self._backend.step)


def split_updates(prediction: Prediction, alpha: float, lora: bool) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
    """Return the shift of the trained tensors (fp32, by the names of a shift file) and what a frozen adapter holds."""
    shift: dict[str, Tensor] = {}
    frozen: dict[str, LowRank] = {}
    for name, delta in weight_deltas(prediction, alpha):
        if isinstance(delta, FactorStep):
            keys = shift_keys(delta.at.module)
            for key, factor, step in zip(keys, (delta.at.A, delta.at.B), (delta.dA, delta.dB), strict=True):
                # What fp32 factors really move by, rounding included.
                shift[key] = ((factor.double() + step).float() - factor.float()).contiguous()
        elif not lora:
            shift[name] = dense(delta).float().contiguous()
        elif isinstance(delta, LowRank):
            frozen[name] = delta
        else:
            raise unsupported(
                f"the jump of '{name}' is dense, which a LoRA run cannot hold; use a predictor of low rank"
            )
    return shift, frozen

"""``jump: swap`` and ``jump: restart``: a jump's weights go into the running trainer, or into a new one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from next_backends.openrlhf.checkpoint_folders import LATEST, newest_state, rotate
from next_backends.openrlhf.trainer import ControlledTrainer
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.errors import BackendError
from next_core.interfaces import Prediction
from next_core.sources.adapter_source import ADAPTER
from next_core.sources.jumps import SHIFT_FILE, jump_folders
from next_core.storage.atomic import write_text

MOMENTS_FILE = "moments.safetensors"
"""In a jump's folder: the optimizer's moments from before it."""


class SwapMode:
    """One trainer, which pauses at each jump and gets new weights."""

    keeps_start = True

    def __init__(self, setup: TrainerSetup) -> None:
        self._setup = setup
        self._trainer: ControlledTrainer | None = None
        self._resumed: tuple[int, int] | None = None
        """Where the trainer began whose state is resumed, and the state's step."""

    @property
    def notes(self) -> Sequence[str]:
        return ["checkpoints are DeepSpeed's fp32 masters"]

    def resume(self, known_jumps: Collection[int]) -> int:
        """Choose the newest whole state of a trainer to resume from. Returns its step; 0 if there is none.

        ``known_jumps`` are the steps of the jumps in the run's journal.
        """
        self._resumed = self._resume_point(known_jumps)
        step = 0 if self._resumed is None else self._resumed[1]
        if step > 0:
            self._setup.history.forget_after(step)
        return step

    def start(self) -> None:
        """Start the first trainer of this process: a new one, or one that resumes."""
        if self._resumed is None:
            self._setup.write_prompts(0)
            self._trainer = ControlledTrainer(self._setup, 0)
            return
        begun, step = self._resumed
        self._setup.write_prompts(begun)
        write_text(self._setup.states(begun) / "_actor" / LATEST, f"global_step{step}")  # it may name another state
        self._trainer = ControlledTrainer(self._setup, begun, load=True)
        if self._trainer.step != step:
            raise BackendError(f"the trainer resumed from step {self._trainer.step}, not {step}", kind="backend-failed")
        self._trainer.ask("load", folder=None, shifts=[], adapters=self._adapters())

    def train(self, until: int) -> None:
        if self._running.step < until:
            self._running.train(until)
        rotate(self._setup.folder, self._setup.config.keep_hf)

    def save(self, step: int, folder: Path) -> None:
        """Write the trained weights of ``step``, which just ended."""
        self._running.ask("save", folder=str(folder))

    def save_for_rollback(self, folder: Path) -> None:
        """Write what a rollback some steps after the jump needs besides the checkpoint into the jump's folder."""
        self._running.ask("save_moments", file=str(folder / MOMENTS_FILE))

    def can_roll_back(self, folder: Path) -> bool:
        """Whether a resumed run can roll back this jump."""
        return (folder / MOMENTS_FILE).exists()

    def jump(self, step: int, prediction: Prediction, alpha: float) -> None:
        """Continue from the jump made after ``step``, which is in the history."""
        self._load(step)

    def undo(self, jumped: int, folder: Path | None = None) -> None:
        """Continue from before the jump after ``jumped``; ``folder`` has the moments, unless no step has ended since.

        The history no longer lists the jump. A trainer restarted for it continues with its fresh moments.
        """
        self._load(jumped, moments=None if folder is None else folder / MOMENTS_FILE)

    def evaluate(self, split: str) -> float | None:
        rows = self._setup.splits.get(split)
        if rows is None:
            return None
        how = "likelihood" if self._setup.run.training.evaluation == "likelihood" else "greedy"
        return float(self._running.ask(how, pairs=[[row["prompt"], str(row["answer"])] for row in rows]))

    def abandon(self) -> None:
        """End the trainer; nothing continues from its weights."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.kill()

    def close(self) -> None:
        """End the trainer. At the end of the run it saves its model first."""
        trainer = self._trainer
        if trainer is not None and trainer.paused and trainer.step == self._setup.run.steps:
            self._trainer = None
            trainer.finish()
        self.abandon()

    @property
    def _running(self) -> ControlledTrainer:
        if self._trainer is None:
            raise BackendError("no trainer is running: it was ended or has failed", kind="backend-process-lost")
        return self._trainer

    def _resume_point(self, known_jumps: Collection[int]) -> tuple[int, int] | None:
        return newest_state(self._setup.folder)

    def _load(self, step: int, moments: Path | None = None, schedule: int | None = None) -> None:
        """Load a checkpoint and the jumps made at its step into the trainer."""
        jumps = (path / SHIFT_FILE for path, jump in jump_folders(self._setup.history.jumps) if jump["step"] == step)
        self._running.ask(
            "load",
            folder=str(self._setup.history.checkpoint(step)),
            shifts=[str(file) for file in jumps if file.exists()],
            adapters=self._adapters(),
            moments=None if moments is None else str(moments),
            schedule=schedule,
        )

    def _adapters(self) -> list[str]:
        """Return the adapters of the active jumps."""
        return [str(path / ADAPTER) for path, jump in jump_folders(self._setup.history.jumps) if jump["adapter"]]


class RestartMode(SwapMode):
    """A new trainer for each jump, with fresh moments."""

    @property
    def notes(self) -> Sequence[str]:
        plain = self._setup.run.control == "plain"
        fresh = ["each restart began with fresh Adam moments; the plain run did not restart"] if plain else []
        return [*super().notes, *fresh]

    def start(self) -> None:
        if self._resumed is not None and self._resumed[0] == self._resumed[1]:
            self._restart(self._resumed[1])
        else:
            super().start()

    def jump(self, step: int, prediction: Prediction, alpha: float) -> None:
        if step < self._setup.run.steps:
            self._restart(step)
        else:  # no training follows
            self._load(step)

    def _resume_point(self, known_jumps: Collection[int]) -> tuple[int, int] | None:
        """Prefer the newest jump to a trainer's state that is no newer: its checkpoint and shift are enough."""
        state, history = super()._resume_point(known_jumps), self._setup.history
        jumps = [jump["step"] for _, jump in jump_folders(history.jumps)]
        newest = max((step for step in jumps if step in known_jumps and history.checkpoint(step).is_dir()), default=0)
        return (newest, newest) if newest >= (1 if state is None else max(1, state[1])) else state

    def _restart(self, step: int) -> None:
        """Replace the trainer by one that begins at ``step`` with the weights of that step and its jump."""
        self.abandon()
        self._setup.write_prompts(step)
        self._trainer = ControlledTrainer(self._setup, step)
        self._load(step, schedule=step * self._setup.updates)

"""``swap`` and ``restart``: the weights of a jump go into the trainer that runs, or into a new one before it begins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from next_backends.openrlhf.checkpoint_folders import LATEST, newest_state, rotate
from next_backends.openrlhf.trainer_client import LiveTrainer
from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.errors import BackendError
from next_core.interfaces import Prediction
from next_core.sources.adapter_source import ADAPTER
from next_core.sources.jumps import SHIFT_FILE, jump_folders
from next_core.storage.atomic import write_text

MOMENTS_FILE = "moments.safetensors"
"""In a jump's folder: the optimizer's moments from before it."""


class Pausing:
    """Trainers under control, one after the other."""

    keeps_start = True

    def __init__(self, setting: TrainerSetup) -> None:
        self._setting = setting
        self._restarts = setting.config.jump == "restart"
        self._trainer: LiveTrainer | None = None
        self._resumed: tuple[int, int] | None = None

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of the run."""
        notes = ["checkpoints are DeepSpeed's fp32 masters"]
        if self._restarts and self._setting.run.control == "plain":
            notes.append("each restart began with fresh Adam moments; the plain run beside it had none")
        return notes

    def resume(self, made: Collection[int]) -> int:
        """Where the next trainer goes on: at the newest whole state that a trainer left, or, where trainers restart, at
        the newest jump, if that is no older. ``made`` are the steps of the jumps that the run knows of. 0 for nowhere.
        """
        history = self._setting.history
        self._resumed = newest_state(self._setting.folder)
        step = 0 if self._resumed is None else self._resumed[1]
        if self._restarts:
            jumps = (record["step"] for _, record in jump_folders(history.jumps))
            newest = max((jump for jump in jumps if jump in made and history.checkpoint(jump).is_dir()), default=0)
            if newest >= max(step, 1):
                self._resumed, step = (newest, newest), newest
        if step > 0:
            history.forget_after(step)
        return step

    @property
    def trainer(self) -> LiveTrainer:
        """The one that runs."""
        if self._trainer is None:
            raise BackendError("no trainer runs: it was ended, or has failed")
        return self._trainer

    def start(self) -> None:
        """The first trainer of this process: of a new run, or one that takes up where another was."""
        if self._resumed is None:
            self._setting.write_prompts(0)
            self._trainer = LiveTrainer(self._setting, 0)
            return
        begun, step = self._resumed
        if begun == step:  # at a jump, which a new trainer takes up
            self._start_anew(step)
            return
        self._setting.write_prompts(begun)
        write_text(self._setting.states(begun) / "_actor" / LATEST, f"global_step{step}")  # it may be another, or torn
        self._trainer = LiveTrainer(self._setting, begun, load=True)
        if self._trainer.step != step:
            raise BackendError(f"the trainer took up step {self._trainer.step}, not {step}")
        self._trainer.ask("load", folder=None, shifts=[], beside=self._beside())

    def train(self, until: int) -> None:
        if self.trainer.step < until:
            self.trainer.train(until)
        rotate(self._setting.folder, self._setting.config.keep_hf)

    def save(self, step: int, folder: Path) -> None:
        """Write the trained weights of ``step``, which just ended."""
        self.trainer.ask("save", folder=str(folder))

    def before_jump(self, folder: Path) -> None:
        """Keep in the jump's folder what a rollback some steps later needs besides the checkpoint."""
        self.trainer.ask("save_moments", file=str(folder / MOMENTS_FILE))

    def jump(self, step: int, folder: Path, prediction: Prediction, alpha: float) -> None:
        """Go on from the jump in ``folder``, made after ``step``."""
        if self._restarts and step < self._setting.run.steps:  # after the last step nothing is trained
            self._start_anew(step)
        else:
            self._load(step)

    def take_back(self, made: int, step: int, folder: Path) -> None:
        """Go on from where the run stood before the jump after ``made``, whose folder says no more that it stands.

        A trainer that was restarted for the jump goes on with its fresh moments.
        """
        moments = folder / MOMENTS_FILE
        self._load(made, moments if made != step else None)

    def rollback_is_kept(self, folder: Path) -> bool:
        """Whether a resumed run can take back this jump."""
        return (folder / MOMENTS_FILE).exists()

    def evaluate(self, split: str) -> float | None:
        rows = self._setting.splits.get(split)
        if rows is None:
            return None
        how = "likelihood" if self._setting.run.training.evaluation == "likelihood" else "greedy"
        return float(self.trainer.ask(how, pairs=[[row["prompt"], str(row["answer"])] for row in rows]))

    def abandon(self) -> None:
        """End a trainer whose weights are not known: nothing goes on from them."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.kill()

    def close(self) -> None:
        """A run that is over ends by itself and saves its model; any other is ended."""
        if self._trainer is not None and self._trainer.paused and self._trainer.step == self._setting.run.steps:
            trainer, self._trainer = self._trainer, None
            trainer.finish()
        self.abandon()

    def _start_anew(self, step: int) -> None:
        """End the trainer, and start one that begins at ``step`` with the weights of that step and its jump."""
        self.abandon()
        self._setting.write_prompts(step)
        self._trainer = LiveTrainer(self._setting, step)
        self._load(step, schedule=step * self._setting.updates)

    def _load(self, step: int, moments: Path | None = None, schedule: int | None = None) -> None:
        """Put the weights of a checkpoint into the trainer, with the jumps that stand at its step."""
        made = (path / SHIFT_FILE for path, jump in jump_folders(self._setting.history.jumps) if jump["step"] == step)
        shifts = [str(file) for file in made if file.exists()]
        self.trainer.ask(
            "load",
            folder=str(self._setting.history.checkpoint(step)),
            shifts=shifts,
            beside=self._beside(),
            moments=None if moments is None else str(moments),
            schedule=schedule,
        )

    def _beside(self) -> list[str]:
        """The adapters of the jumps that stand."""
        return [str(path / ADAPTER) for path, record in jump_folders(self._setting.history.jumps) if record["adapter"]]

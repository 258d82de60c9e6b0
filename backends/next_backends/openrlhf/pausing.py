"""``swap`` and ``restart``: the weights of a jump go into the trainer that runs, or into a new one before it begins."""

from __future__ import annotations

from pathlib import Path

from next_backends.openrlhf.folders import newest_state, rotate
from next_backends.openrlhf.live import LiveTrainer
from next_backends.openrlhf.setting import Setting
from next_core.errors import BackendError
from next_core.interfaces import Prediction
from next_core.sources.jumps import SHIFT_FILE, jump_folders
from next_core.sources.peft_adapter import ADAPTER

MOMENTS_FILE = "moments.safetensors"
"""In a jump's folder: the optimizer's moments from before it."""
LOST = 1e-2
"""How much of a jump, relative, may be missing when it has reached the trainer."""


class Pausing:
    """Trainers under control, one after the other."""

    notes = ("checkpoints are DeepSpeed's fp32 masters",)
    keeps_start = True

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._restarts = setting.config.jump == "restart"
        self._trainer: LiveTrainer | None = None
        self._resumed: tuple[int, int] | None = None

    def resume(self) -> int:
        """The step of the newest complete state that a trainer left, where the next one goes on; 0 for none."""
        self._resumed = newest_state(self._setting.folder)
        if self._resumed is None:
            return 0
        self._setting.history.forget_after(self._resumed[1])
        return self._resumed[1]

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
        if self._restarts and self._setting.history.jump_at(step) is not None:  # its new trainer left nothing yet
            self._start_anew(step)
            return
        self._setting.write_prompts(begun)
        self._trainer = LiveTrainer(self._setting, begun, load=True)
        if self._trainer.step != step:
            raise BackendError(f"the trainer took up step {self._trainer.step}, not {step}")
        self._trainer.ask("load", folder=None, shifts=[], beside=self._beside())

    def train(self, until: int) -> None:
        self.trainer.train(until)
        rotate(self._setting.folder, self._setting.config.keep_hf)

    def save(self, step: int, folder: Path) -> None:
        """Write the trained weights of ``step``, which just ended."""
        self.trainer.ask("save", folder=str(folder))

    def before_jump(self, folder: Path) -> None:
        """Keep in the jump's folder what a rollback some steps later needs besides the checkpoint."""
        self.trainer.ask("save_moments", file=str(folder / MOMENTS_FILE))

    def jump(self, step: int, folder: Path, prediction: Prediction, alpha: float, norm: float) -> None:
        """Go on from the jump in ``folder``, made after ``step``; its shift moves what trains by ``norm``."""
        if self._restarts:
            self._start_anew(step)
            return
        moved = self._load(step, [folder / SHIFT_FILE] if norm > 0 else [])
        if abs(moved - norm) > LOST * norm:
            raise BackendError(f"of a jump of norm {norm:.3g}, {moved:.3g} reached the trainer")

    def take_back(self, made: int, step: int, folder: Path) -> None:
        """Go on from where the run stood before the jump after ``made``, whose folder says no more that it stands."""
        moments = folder / MOMENTS_FILE
        self._load(made, [], moments if made != step else None)

    def rollback_is_kept(self, folder: Path) -> bool:
        """Whether a resumed run can take back this jump."""
        return (folder / MOMENTS_FILE).exists()

    def evaluate(self, split: str) -> float | None:
        rows = self._setting.splits.get(split)
        if rows is None:
            return None
        how = "likelihood" if self._setting.run.training.evaluation == "likelihood" else "greedy"
        return float(self.trainer.ask(how, pairs=[[row["prompt"], str(row["answer"])] for row in rows]))

    def close(self) -> None:
        """A run that is over ends by itself and saves its model; any other is ended."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.finish() if trainer.paused and trainer.step == self._setting.run.steps else trainer.kill()

    def _start_anew(self, step: int) -> None:
        """End the trainer, and start one that begins at ``step`` with the weights of that step and its jump."""
        if self._trainer is not None:
            self._trainer.kill()
            self._trainer = None
        found = self._setting.history.jump_at(step)
        shifts = [found[0] / SHIFT_FILE] if found is not None and (found[0] / SHIFT_FILE).exists() else []
        self._setting.write_prompts(step)
        self._trainer = LiveTrainer(self._setting, step)
        self._load(step, shifts, schedule=step * self._setting.updates)

    def _load(self, step: int, shifts: list[Path], moments: Path | None = None, schedule: int | None = None) -> float:
        """Put the weights of a checkpoint into the trainer, shifted. Returns how far they moved."""
        moved = self.trainer.ask(
            "load",
            folder=str(self._setting.history.checkpoint(step)),
            shifts=[str(path) for path in shifts],
            beside=self._beside(),
            moments=None if moments is None else str(moments),
            schedule=schedule,
        )
        return float(moved)

    def _beside(self) -> list[str]:
        """The adapters of the jumps that stand."""
        return [str(path / ADAPTER) for path, record in jump_folders(self._setting.history.jumps) if record["adapter"]]

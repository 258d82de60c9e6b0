"""The optimizer steps of a trainer in another process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from next_backends.external.trainer import Trainer
from next_core.interfaces import Applied
from next_core.interfaces.trainer_steps import MeanApplied, TrainerSteps


class RemoteSteps(TrainerSteps):
    """``OptimizerSteps`` in the trainer's processes: each call is a request to the paused ``trainer``."""

    def __init__(self, trainer: Trainer, windows: Sequence[int], kept: Path, step: int, state: Path | None) -> None:
        """Follow the steps after ``step``; ``state`` is the trainer's state that a resumed run has loaded."""
        self._trainer = trainer
        self._now: dict[str, Any] = {}  # What the trainer answered last
        folder = None if state is None else str(state)
        request = {"windows": list(windows), "kept": str(kept), "at": step, "folder": folder}
        self.note: str | None = trainer.ask("follow_steps", **request)
        self.products()

    @property
    def multiple(self) -> float:
        return float(self._now["multiple"])

    @multiple.setter
    def multiple(self, value: float) -> None:
        self._ask("on_steps", "set_multiple", value)

    @property
    def learning_rate(self) -> float:
        return float(self._now["learning_rate"])

    @property
    def kept(self) -> Sequence[int]:
        return [int(step) for step in self._now["kept"]]

    def after_step(self) -> None:
        self._ask("on_steps", "after_step")

    def end_block(self) -> None:
        self._ask("on_steps", "end_block")

    def products(self) -> Tensor:
        rows = self._ask("on_steps", "products")
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(rows))

    def keep(self, step: int) -> None:
        self._ask("on_steps", "keep", step)

    def undo(self, step: int) -> None:
        self._ask("move", "undo", step)

    def apply_mean(self, window: int) -> Applied:
        self._ask("move", "apply_mean", window)
        return MeanApplied(self)

    def replace_back(self) -> None:
        self._ask("move", "replace_back")

    def _ask(self, what: str, method: str, *arguments: float) -> Any:
        self._now = self._trainer.ask(what, method=method, arguments=arguments)
        return self._now["value"]

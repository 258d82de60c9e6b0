"""What an applier promises: resolve the anchor, scale by alpha, write, and undo."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from next_core.interfaces.prediction import Prediction
from next_core.types import Plugin, Progress


class Applied(ABC):
    """Weights that were changed; ``rollback`` puts back exactly what was there."""

    @abstractmethod
    def rollback(self) -> None:
        """Restore the state from before the apply, bit for bit."""


class WeightApplier(Plugin):
    """Resolves the anchor, scales by alpha, writes. All is computed and validated before anything changes."""

    writes_folders: ClassVar[bool] = True
    """Whether ``apply`` writes a folder; False for an applier that changes a model in memory."""
    progress: Progress | None = None

    def report_progress(self, what: str, done: int, total: int) -> None:
        """Report to ``progress``, where there is one."""
        if self.progress is not None:
            self.progress(what, done, total)

    @abstractmethod
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> Applied:
        """Write W_T + alpha * confidence * (prediction - W_T) to ``out``: a folder, or a live model."""

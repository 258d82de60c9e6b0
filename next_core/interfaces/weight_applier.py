"""The interface of appliers: turn a prediction into weights, and undo it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from next_core.interfaces.prediction import Prediction
from next_core.types import Plugin, Progress


class Applied(ABC):
    """Weights that an applier changed."""

    @abstractmethod
    def rollback(self) -> None:
        """Restore the state from before the apply, bit for bit."""


class WeightApplier(Plugin):
    """Turns a prediction into weights. An error leaves the weights as they were."""

    writes_folders: ClassVar[bool] = True
    """Whether ``apply`` writes a folder; False for an applier that changes a model in memory."""
    progress: Progress | None = None

    def report_progress(self, what: str, done: int, total: int) -> None:
        """Call ``progress`` if it is set."""
        if self.progress is not None:
            self.progress(what, done, total)

    @abstractmethod
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> Applied:
        """Write W_T + alpha * confidence * (predicted - W_T) to ``out``: a new folder, or a live model.

        Raises ``GuardError`` for values that are not finite, ``PluginError`` for an update that does not fit the run.
        """

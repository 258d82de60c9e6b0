"""The interface of a trainer's own steps, as step scaling reads, multiplies and undoes them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from next_core.interfaces.weight_applier import Applied


class TrainerSteps(ABC):
    """The optimizer steps of a run that is training."""

    multiple: float = 1.0
    """The learning rate of the following steps is the scheduler's, times this."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The scheduler's learning rate of the last step, without the multiple."""

    @abstractmethod
    def after_step(self) -> None:
        """Take account of the step that just ended. Called once after every step."""

    @abstractmethod
    def end_block(self) -> None:
        """End a block of steps: its motion is compared with that of other blocks."""

    @abstractmethod
    def products(self) -> Tensor:
        """Return the inner products of the last blocks' motions, (n, n), oldest first; n is 0 to 4.

        A motion is free of momentum and of the learning rate: what the gradients of its steps add up to.
        """

    @abstractmethod
    def keep(self, step: int) -> None:
        """Keep weights and optimizer moments, to return to. The oldest of more than two is dropped."""

    @property
    @abstractmethod
    def kept(self) -> Sequence[int]:
        """The steps after which a state was kept, oldest first."""

    @abstractmethod
    def undo(self, step: int) -> None:
        """Restore the state kept after ``step``; states kept later are dropped, and motions start again."""

    @abstractmethod
    def apply_mean(self, window: int) -> Applied:
        """Replace the weights by their mean over about the last ``window`` steps."""

    @abstractmethod
    def replace_back(self) -> None:
        """Undo ``apply_mean``."""


class MeanApplied(Applied):
    """Weights that were replaced by their mean."""

    def __init__(self, steps: TrainerSteps) -> None:
        self._steps = steps

    def rollback(self) -> None:
        self._steps.replace_back()

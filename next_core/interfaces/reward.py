"""The interface of verifiable rewards."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from next_core.types import Plugin


class Reward(Plugin):
    """A verifiable reward, called as TRL calls its reward functions."""

    @abstractmethod
    def __call__(self, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
        """Return one reward for each completion; ``answer`` and ``columns`` are columns of the data set."""

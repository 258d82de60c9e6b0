"""The interface of compressors: deltas in, their leading singular triplets out."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank
from next_core.types import Plugin, Span


class Compressor(Plugin):
    """Reduces deltas to their leading singular triplets."""

    @abstractmethod
    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        """Compress N deltas of one shape (m, n) to ``Factors``: U (N, m, k), S (N, k), V (N, n, k).

        Zero deltas give zero columns, never arbitrary unit vectors.
        """

    def compress_trajectory(
        self, trajectory: LoraTrajectory, spans: Sequence[Span], rank: int, spectrum: bool = False
    ) -> Factors:
        """Compress several deltas of one LoRA matrix, which share their factors; N is len(spans).

        ``spectrum`` requests the sum of all singular values (``Factors.nuclear``), which may otherwise be None.
        """
        return self.compress([trajectory.delta(*span) for span in spans], rank)

"""The move of one parameter: as LoRA factors, a low-rank matrix, a dense matrix, or read block by block."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.interfaces.checkpoint_source import CheckpointSource
from next_core.mathematics import low_rank
from next_core.mathematics.low_rank import LowRank
from next_core.mathematics.row_blocks import row_blocks
from next_core.types import LoraFactors

BLOCK = 2**18
"""Values in a block of rows: small enough to stay in the processor's cache during several passes."""


@dataclass(frozen=True)
class FactorStep:
    """A move of the trained adapter's own factors, A += dA (r, n) and B += dB (m, r), from where they are ``at``."""

    dA: Tensor  # noqa: N815
    dB: Tensor  # noqa: N815
    at: LoraFactors

    def merged(self) -> LowRank:
        """Return the move of the weight matrix: scaling * ((B + dB)(A + dA) - B A)."""
        after = self.at.A.double() + self.dA, self.at.B.double() + self.dB
        return low_rank.lora_difference(after, (self.at.A, self.at.B), self.at.scaling)


@dataclass(frozen=True)
class LazyDelta:
    """A move of a dense parameter (m, n), read in blocks of rows: sum_t weights[t] (W_t - W_T) + matrix.

    T is ``step``, the newest checkpoint. ``weights`` are keyed by step, None for where RL began; T is not among them.
    """

    source: CheckpointSource
    name: str
    shape: tuple[int, int]
    step: int
    weights: Mapping[int | None, float]
    matrix: LowRank | None = None

    def rows(self, rows: slice, newest: Tensor | None = None) -> Tensor:
        """Return some rows, in at least fp32.

        ``newest``, the same rows of W_T of a source that stores full weights, saves reading them for each term; the
        result is then not checked for NaN.
        """
        terms = [self._term(rows, since, weight, newest) for since, weight in self.weights.items()]
        if self.matrix is not None:
            terms.append(self.matrix.left[rows] @ self.matrix.right)
        total = terms[0]
        for term in terms[1:]:
            total.add_(term)
        return total

    def _term(self, rows: slice, since: int | None, weight: float, newest: Tensor | None) -> Tensor:
        if newest is None:
            return self.source.delta_rows(self.name, rows, self.step, since).mul(-weight)
        stored = self.source.weight_as_stored(self.name, since, rows)
        return (stored.to(torch.promote_types(stored.dtype, newest.dtype)) - newest).mul_(weight)

    def dense(self) -> Tensor:
        """Return the whole matrix in fp32, or in fp64 where the source reads fp64."""
        blocks = row_blocks(self.shape, BLOCK)
        whole = torch.empty(self.shape, dtype=self.rows(blocks[0]).dtype)
        for rows in blocks:
            whole[rows] = self.rows(rows)
        return whole

    def norm(self) -> float:
        """Return the Frobenius norm, computed block by block."""
        return math.sqrt(
            sum(float(torch.linalg.vector_norm(self.rows(rows))) ** 2 for rows in row_blocks(self.shape, BLOCK))
        )


WeightDelta = FactorStep | LowRank | Tensor
Resolved = WeightDelta | LazyDelta


def transposed(moved: Resolved | None) -> LowRank | Tensor | None:
    """Return the move (n, m) of a matrix that is stored transposed."""
    return None if moved is None else (moved.dense() if isinstance(moved, LazyDelta) else merged(moved)).T


def merged(moved: WeightDelta) -> LowRank | Tensor:
    """Return a move as it acts on the weight matrix."""
    return moved.merged() if isinstance(moved, FactorStep) else moved

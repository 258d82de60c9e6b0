"""The computations of one matrix from its checkpoints: the unit of work that executors map over matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from next_core.interfaces import CheckpointSource, Compressor
from next_core.mathematics.lora_trajectory import LoraTrajectory, Workspace
from next_core.mathematics.low_rank import Factors, LowRank, concatenate_batches, gram
from next_core.mathematics.row_blocks import row_blocks
from next_core.types import LoraFactors, Span

BLOCK_BYTES = 32 * 2**20  # Upper bound on the memory of the rows of dense deltas that are held at a time


@dataclass(frozen=True)
class Compress:
    """Compute the rank-k triplets of one matrix's deltas: ``Factors`` with leading dimension len(spans)."""

    source: CheckpointSource
    compressor: Compressor
    spans: tuple[Span, ...]
    rank: int
    spectrum: bool
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, name: str) -> Factors:
        trajectory = lora_trajectory(self.source, name, self.spans, self.workspace)
        if trajectory is not None:
            return self.compressor.compress_trajectory(trajectory, self.spans, self.rank, self.spectrum)
        # One delta at a time: a dense one is as large as its matrix.
        parts = [self.compressor.compress([self.source.delta(name, *span)], self.rank) for span in self.spans]
        return concatenate_batches(parts)


@dataclass(frozen=True)
class InnerProducts:
    """Compute the inner products of one matrix's deltas, fp64, (len(spans), len(spans))."""

    source: CheckpointSource
    spans: tuple[Span, ...]
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, name: str) -> Tensor:
        trajectory = lora_trajectory(self.source, name, self.spans, self.workspace)
        if trajectory is not None:
            return trajectory.gram(self.spans)
        parameter = next(parameter for parameter in self.source.parameters if parameter.name == name)
        if parameter.rank is None:
            return self._of_dense(name, parameter.shape)
        deltas = [self.source.delta(name, *span) for span in self.spans]
        return gram([delta for delta in deltas if isinstance(delta, LowRank)])

    def _of_dense(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Sum over blocks of rows, so that memory does not grow with the matrix times the checkpoints."""
        products = torch.zeros(len(self.spans), len(self.spans), dtype=torch.float64)
        for rows in row_blocks(shape, BLOCK_BYTES // (8 * len(self.spans))):
            flat = torch.stack([self.source.delta_rows(name, rows, *span).flatten().double() for span in self.spans])
            products += flat @ flat.T
        return products


def lora_trajectory(
    source: CheckpointSource, name: str, spans: Sequence[Span], workspace: Workspace | None = None
) -> LoraTrajectory | None:
    """Return the LoRA factors behind some deltas of a matrix; None where the run is not LoRA."""
    factors: dict[int, LoraFactors] = {}
    for step in sorted({step for span in spans for step in span if step is not None}):
        at = source.factors(name, step)
        if at is None:
            return None
        factors[step] = at
    return LoraTrajectory(factors, source.start(name) if any(since is None for _, since in spans) else None, workspace)

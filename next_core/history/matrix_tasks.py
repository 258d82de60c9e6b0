"""What is computed of one matrix of a run, from its checkpoints alone: the unit that executors map over matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from next_core.interfaces import CheckpointSource, Compressor
from next_core.mathematics import low_rank as lowrank
from next_core.mathematics.lora_trajectory import LoraTrajectory, Workspace
from next_core.mathematics.low_rank import Factors, LowRank
from next_core.mathematics.row_blocks import row_blocks
from next_core.types import LoraFactors, Span

BLOCK_BYTES = 32 * 2**20
"""Rows of dense deltas that are held at a time take at most this much memory."""


@dataclass(frozen=True)
class Compress:
    """The rank-k triplets of one matrix's deltas: ``Factors`` with leading dimension len(spans)."""

    source: CheckpointSource
    compressor: Compressor
    spans: tuple[Span, ...]
    rank: int
    spectrum: bool
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, name: str) -> Factors:
        path = lora_trajectory(self.source, name, self.spans, self.workspace)
        if path is not None:
            return self.compressor.compress_trajectory(path, self.spans, self.rank, self.spectrum)
        # One delta at a time: a dense one is as large as its matrix.
        parts = [self.compressor.compress([self.source.delta(name, *span)], self.rank) for span in self.spans]
        return lowrank.concatenate_batches(parts)


@dataclass(frozen=True)
class InnerProducts:
    """The inner products of one matrix's deltas, fp64, (len(spans), len(spans))."""

    source: CheckpointSource
    spans: tuple[Span, ...]
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, name: str) -> Tensor:
        path = lora_trajectory(self.source, name, self.spans, self.workspace)
        if path is not None:
            return path.gram(self.spans)
        parameter = next(parameter for parameter in self.source.parameters if parameter.name == name)
        if parameter.rank is None:
            return self._of_dense(name, parameter.shape)
        deltas = [self.source.delta(name, *span) for span in self.spans]
        return lowrank.gram([delta for delta in deltas if isinstance(delta, LowRank)])

    def _of_dense(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Summed over blocks of rows, so that memory does not grow with the matrix times the checkpoints."""
        gram = torch.zeros(len(self.spans), len(self.spans), dtype=torch.float64)
        for rows in row_blocks(shape, BLOCK_BYTES // (8 * len(self.spans))):
            flat = torch.stack([self.source.delta_rows(name, rows, *span).flatten().double() for span in self.spans])
            gram += flat @ flat.T
        return gram


def lora_trajectory(
    source: CheckpointSource, name: str, spans: Sequence[Span], workspace: Workspace | None = None
) -> LoraTrajectory | None:
    """The factors that some deltas of a matrix are made of; None where the run is not LoRA."""
    factors: dict[int, LoraFactors] = {}
    for step in sorted({step for span in spans for step in span if step is not None}):
        at = source.factors(name, step)
        if at is None:
            return None
        factors[step] = at
    return LoraTrajectory(factors, source.start(name) if any(since is None for _, since in spans) else None, workspace)

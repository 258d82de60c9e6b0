"""Exact rank-k SVD: of the thin factors for LoRA runs, of the dense matrix otherwise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from next_core.errors import other_model
from next_core.interfaces import Compressor
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank, concatenate_batches, truncated_svd
from next_core.types import Span


class ExactCompressor(Compressor):
    """Exact SVD. LoRA deltas never become m x n matrices; dense ones are decomposed one at a time."""

    name = "exact"

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        factored = [delta for delta in deltas if isinstance(delta, LowRank)]
        if len(factored) == len(deltas):
            return truncated_svd(LowRank.stack(factored), rank)
        if factored:
            raise other_model(
                "factored and dense deltas of one matrix cannot be mixed; are all checkpoints of one run?"
            )
        return concatenate_batches([_dense_svd(delta, rank) for delta in deltas if isinstance(delta, Tensor)])

    def compress_trajectory(
        self, trajectory: LoraTrajectory, spans: Sequence[Span], rank: int, spectrum: bool = False
    ) -> Factors:
        return trajectory.triplets(spans, rank, spectrum)


def _dense_svd(delta: Tensor, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    # For a zero singular value LAPACK returns arbitrary unit vectors: set them to zero, they are not data.
    alive = S.new_tensor(max(delta.shape) * torch.finfo(S.dtype).eps) * S[:1] < S
    U, S, V = U * alive, S * alive, Vh.T * alive
    return Factors(U[:, :rank], S[:rank], V[:, :rank], S.square().sum(), S.sum()).batch()

"""Leading singular triplets of a dense delta by Lanczos: a few products with the matrix in place of its whole SVD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from scipy.sparse.linalg import ArpackError, svds
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.interfaces import Compressor, PluginConfig, Span
from next_core.lora_path import LoraPath
from next_core.lowrank import Factors, LowRank, concatenate_batches


class LanczosConfig(PluginConfig):
    tol: float = Field(1e-6, gt=0, description="Relative accuracy asked of each singular value")
    residual: float = Field(
        1e-4, gt=0, description="Bound on |A v - sigma u| + |A^T u - sigma v| over sigma_1; above it, the full SVD"
    )


class LanczosCompressor(Compressor):
    """Implicitly restarted Lanczos (ARPACK through SciPy), with a residual check and the full SVD to fall back on.

    Factored deltas are decomposed exactly, as by ``exact``. The whole spectrum is not known: ``nuclear`` is None, and
    ``energy`` is the squared norm of the matrix itself. Deterministic: the start vector is fixed.
    """

    name = "lanczos"
    config_class = LanczosConfig

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        dense = [delta for delta in deltas if isinstance(delta, Tensor)]
        if len(dense) < len(deltas):
            return ExactCompressor().compress(deltas, rank)
        return concatenate_batches([self._leading(delta, rank) for delta in dense])

    def compress_path(self, path: LoraPath, spans: Sequence[Span], rank: int, spectrum: bool = False) -> Factors:
        return path.triplets(spans, rank, spectrum)

    def _leading(self, delta: Tensor, rank: int) -> Factors:
        small = min(delta.shape)
        energy = delta.double().square().sum()
        if rank >= small or energy == 0.0:
            return ExactCompressor().compress([delta], rank)
        matrix = delta.float().numpy()
        start = np.random.default_rng(0).standard_normal(small).astype(matrix.dtype)
        try:
            u, s, vh = svds(matrix, k=rank, tol=self.config.tol, v0=start)
        except ArpackError:
            return ExactCompressor().compress([delta], rank)
        order = np.argsort(s)[::-1]
        U, S, V = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in (u[:, order], s[order], vh[order].T))
        if self._residual(torch.from_numpy(matrix), U, S, V) > self.config.residual:
            return ExactCompressor().compress([delta], rank)
        return Factors(U, S, V, energy, None).batch()

    @staticmethod
    def _residual(matrix: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
        right = (matrix @ V.float()).double() - U * S
        left = (matrix.T @ U.float()).double() - V * S
        return float((right.norm(dim=0) + left.norm(dim=0)).max() / S[0])

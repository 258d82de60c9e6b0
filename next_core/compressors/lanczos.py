"""Leading singular triplets of a dense delta by Lanczos: a dozen passes over the matrix in place of its whole SVD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.interfaces import Compressor
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank, concatenate_batches
from next_core.settings import Settings
from next_core.types import Span

_ROWS = 256
"""Rows of A that A^T (A x) takes at a time: they are still in the cache for the second product."""
_EXHAUSTED = 1e-15
_SLACK = 10.0
"""The true residual may exceed the one that Lanczos reckons with by this much, which is fp32's rounding."""


class LanczosConfig(Settings):
    tol: float = Field(
        1e-6,
        ge=1e-6,
        description="Residual |A^T A v - sigma^2 v| / sigma_1^2 of each triplet; fp32 products hold 1e-6",
    )
    iterations: int = Field(300, ge=2, description="Passes over the matrix before the full SVD is taken instead")


class LanczosCompressor(Compressor):
    """Lanczos on A^T A with full reorthogonalisation, one pass over A an iteration; the full SVD where it fails.

    Products are fp32, the basis and what is made of it fp64. Factored deltas are decomposed exactly, as by ``exact``.
    The whole spectrum is not known: ``nuclear`` is None, and ``energy`` is the squared norm of the matrix itself.
    Deterministic: the start vector is fixed. Of singular values that are equal to rounding a rank k > 1 may miss one.
    """

    name = "lanczos"
    config_class = LanczosConfig

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        dense = [delta for delta in deltas if isinstance(delta, Tensor)]
        if len(dense) < len(deltas):
            return ExactCompressor().compress(deltas, rank)
        return concatenate_batches([self._leading(delta, rank) for delta in dense])

    def compress_trajectory(
        self, path: LoraTrajectory, spans: Sequence[Span], rank: int, spectrum: bool = False
    ) -> Factors:
        return path.triplets(spans, rank, spectrum)

    def _leading(self, delta: Tensor, rank: int) -> Factors:
        found = None if rank >= min(delta.shape) else self._lanczos(torch.split(delta.detach().float(), _ROWS), rank)
        return ExactCompressor().compress([delta], rank) if found is None else found

    def _lanczos(self, blocks: Sequence[Tensor], k: int) -> Factors | None:
        """The triplets, or None where the residual stays too large."""
        norm = torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks]).double().norm()
        if norm == 0 and not any(bool(block.any()) for block in blocks):
            sizes = sum(len(block) for block in blocks), blocks[0].shape[1]
            U, V = (torch.zeros(size, k, dtype=torch.float64) for size in sizes)
            return Factors(U, torch.zeros(k, dtype=torch.float64), V, norm, None).batch()
        if not 1e-30 < float(norm) < 1e30:  # beyond what fp32 can square
            return None
        found = self._eigenvectors(blocks, 1 / norm, k)
        if found is None:
            return None
        squares, V = found
        AV = torch.cat([block @ V.float() for block in blocks]).double()
        S = AV.norm(dim=0)
        U = AV / S
        residual = torch.stack([_normal_product(blocks, v, 1 / norm) for v in V.T], 1) - V * squares
        if not bool((residual.norm(dim=0) <= _SLACK * self.config.tol * squares[0]).all()):
            return None
        return Factors(U, S, V, norm.square(), None).batch()

    def _eigenvectors(self, blocks: Sequence[Tensor], scale: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """The k largest eigenvalues (k,) of scale^2 A^T A and their vectors (n, k)."""
        n = blocks[0].shape[1]
        size = min(n, self.config.iterations)
        Q, T = torch.zeros(size, n, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        q = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q = q / q.norm()
        for j in range(size):
            Q[j] = q
            w = _normal_product(blocks, q, scale)
            for _ in range(2):
                h = Q[: j + 1] @ w
                w = w - h @ Q[: j + 1]
                T[j, j] += h[j]
            beta = w.norm()
            squares, s = torch.linalg.eigh(T[: j + 1, : j + 1])
            if j + 1 >= k:
                residual = float(beta * s[-1, -k:].abs().max())
                if residual <= self.config.tol * float(squares[-1]):
                    order = torch.arange(j, j - k, -1)
                    return squares[order], (s[:, order].T @ Q[: j + 1]).T
            if float(beta) <= _EXHAUSTED * float(squares[-1]):
                return None  # A has fewer than k singular values that are not zero
            if j + 1 < size:
                T[j, j + 1] = T[j + 1, j] = beta
                q = w / beta
        return None


def _normal_product(blocks: Sequence[Tensor], v: Tensor, scale: Tensor) -> Tensor:
    """scale^2 A^T (A v), fp32 products, fp64 in and out; every block of rows is read once."""
    x = (v * scale).float()
    out = torch.zeros_like(x)
    for block in blocks:
        out.addmv_(block.T, block @ x)
    return out.double() * scale

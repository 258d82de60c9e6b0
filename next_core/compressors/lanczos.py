"""Leading singular triplets of a dense delta by Lanczos: a dozen passes over the matrix instead of its full SVD."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from threadpoolctl import ThreadpoolController
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.mathematics.low_rank import Factors, LowRank, concatenate_batches
from next_core.settings import Settings

Array = npt.NDArray[np.float32]
_ROWS = 64  # Rows of A per block of A^T (A x): they are still in the processor's cache for the second product
_EXHAUSTED = 1e-15  # A Lanczos coefficient at or below this part of sigma_1^2 is rounding: the Krylov space is complete
_SLACK = 10.0  # Factor by which the true residual may exceed the estimate of Lanczos, because products round in fp32


class LanczosConfig(Settings):
    """Settings of Lanczos."""

    tol: float = Field(
        1e-6, ge=1e-6, description="Residual |A^T A v - sigma^2 v| / sigma_1^2 of each triplet; fp32 products hold 1e-6"
    )
    iterations: int = Field(300, ge=2, description="Passes over the matrix before the full SVD is taken instead")


class LanczosCompressor(ExactCompressor):
    """Lanczos on A^T A with full reorthogonalisation, one pass over A per iteration; full SVD where it fails.

    Products with A are fp32, the basis and everything computed from it fp64. Factored deltas are decomposed exactly, as
    by ``exact``. The full spectrum is not known: ``nuclear`` is None, and ``energy`` is the squared norm of the matrix.
    Deterministic: the start vector is fixed. With k > 1, one of several equal singular values may be missed: a Krylov
    space contains one direction of each eigenspace.
    """

    name = "lanczos"
    config_class = LanczosConfig

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        dense = [delta for delta in deltas if isinstance(delta, Tensor)]
        if len(dense) < len(deltas):
            return super().compress(deltas, rank)
        return concatenate_batches([self._leading(delta, rank) for delta in dense])

    def _leading(self, delta: Tensor, rank: int) -> Factors:
        if rank >= min(delta.shape):
            return super().compress([delta], rank)
        blocks = [block.numpy() for block in torch.split(delta.detach().float(), _ROWS)]
        with _blas().limit(limits=torch.get_num_threads()):
            found = self._lanczos(blocks, rank)
        return super().compress([delta], rank) if found is None else found

    def _lanczos(self, blocks: Sequence[Array], k: int) -> Factors | None:
        """Return the triplets, or None where Lanczos fails or its residual is too large."""
        rows = [np.sqrt(np.einsum("ij,ij->i", block, block)) for block in blocks]
        norm = torch.from_numpy(np.concatenate(rows)).double().norm()
        if norm == 0 and not any(block.any() for block in blocks):
            sizes = sum(len(block) for block in blocks), blocks[0].shape[1]
            U, V = (torch.zeros(size, k, dtype=torch.float64) for size in sizes)
            return Factors(U, torch.zeros(k, dtype=torch.float64), V, norm, None).batch()
        if not 1e-30 < float(norm) < 1e30:  # fp32 cannot represent the squares
            return None
        found = self._eigenvectors(blocks, 1 / norm, k)
        if found is None:
            return None
        squares, V = found
        # sigma = |A v| and not the root of the eigenvalue: fp32 rounding of A^T A is relative to sigma_1^2, which would
        # cost a small sigma half its digits.
        U, products = map(torch.stack, zip(*(_products(blocks, v, 1 / norm) for v in V.T), strict=True))
        U, S = U.T * norm, U.norm(dim=1) * norm
        # The estimate of Lanczos holds in exact arithmetic. Where products are rounded only the matrix can confirm it.
        residual = products.T - V * squares
        if not bool((residual.norm(dim=0) <= _SLACK * self.config.tol * squares[0]).all()):
            return None
        return Factors(U / S, S, V, norm.square(), None).batch()

    def _eigenvectors(self, blocks: Sequence[Array], scale: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Return the k largest eigenvalues (k,) of scale^2 A^T A and their vectors (n, k); None where that fails.

        ``scale`` is 1 / |A|_F, so that fp32 products neither overflow nor underflow.
        """
        n = blocks[0].shape[1]
        size = min(n, self.config.iterations)
        Q, T = torch.zeros(size, n, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        # Random, so that it is orthogonal to no leading vector; from a fixed seed, so that runs agree bit for bit.
        q = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q = q / q.norm()
        for j in range(size):
            Q[j] = q
            w = _products(blocks, q, scale)[1]
            for _ in range(2):  # one Gram-Schmidt pass leaves rounding along the basis; the second removes it
                h = Q[: j + 1] @ w
                w = w - h @ Q[: j + 1]
                T[j, j] += h[j]
            beta = w.norm()
            # Cheap next to a pass over A, so it is tested every iteration: |A^T A v - theta v| of a Ritz pair is beta
            # times the last entry of its coefficients.
            squares, s = torch.linalg.eigh(T[: j + 1, : j + 1])
            if j + 1 >= k:
                residual = float(beta * s[-1, -k:].abs().max())
                if residual <= self.config.tol * float(squares[-1]):
                    order = torch.arange(j, j - k, -1)
                    return squares[order], (s[:, order].T @ Q[: j + 1]).T
            if float(beta) <= _EXHAUSTED * float(squares[-1]):
                return None  # A has fewer than k non-zero singular values
            if j + 1 < size:
                T[j, j + 1] = T[j + 1, j] = beta
                q = w / beta
        return None


def _products(blocks: Sequence[Array], v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale A v and scale^2 A^T (A v): fp32 products, fp64 input and output; every block of rows is read once.

    By NumPy, whose OpenBLAS multiplies a transposed block in the cache a third faster than torch's MKL. On some CPUs it
    warns of an invalid value though all products are finite (numpy/numpy#24067); the caller checks the residual.
    """
    x = (v * scale).float().numpy()
    out = np.zeros_like(x)
    images = []
    with np.errstate(invalid="ignore"):
        for block in blocks:
            images.append(block @ x)
            out += images[-1] @ block
    return torch.from_numpy(np.concatenate(images)).double(), torch.from_numpy(out).double() * scale


@functools.cache
def _blas() -> ThreadpoolController:
    """Return the handle on NumPy's BLAS, which does not know how many threads torch was given."""
    return ThreadpoolController().select(user_api="blas")

"""Isotropic random walks with the observed step lengths: the null of every figure that follows from inner products."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from next_core.history.history import History
from next_core.types import LoraFactors

CHUNK_BYTES = 32 * 2**20  # Gram matrices that are drawn at a time take at most this much memory
FEWEST_DRAWS = 20  # Fewer walks than this give no interval
FEW_DRAWS = 40  # Below this many draws, quantiles say little and the interval is Student's prediction interval


def band(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and both ends of the 95% interval over the leading dimension: quantiles, or Student's for few draws."""
    count, mean = draws.shape[0], draws.mean(0)
    if count >= FEW_DRAWS:
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)
        return mean, low, high
    half = stdtrit(count - 1, 0.975) * (1 + 1 / count) ** 0.5 * draws.std(0)
    return mean, mean - half, mean + half


def isotropic_walks(lengths: Tensor, dimensions: Tensor, draws: int, rng: np.random.Generator) -> Tensor:
    """Gram matrices of N steps in uniformly random directions: (draws, M, N, N), fp64.

    ``lengths`` (M, N) are the norms of the steps, ``dimensions`` (M,) of the space they are taken in; they need not be
    whole. No vector of that space is drawn: by Bartlett, N Gaussian vectors in d dimensions have the Gram matrix L L^T
    with L lower triangular, L_ij normal below the diagonal and L_ii^2 chi-squared with d - i degrees of freedom
    (columns beyond d are absent). Rows of L scaled to norm l_i give directions that are exactly uniform.
    """
    matrices, size = lengths.shape
    freedom = dimensions.double().numpy()[:, None] - np.arange(size)  # (M, N)
    alive = freedom > 0
    squares = rng.chisquare(np.where(alive, freedom, 1.0), (draws, matrices, size))
    factor = np.zeros((draws, matrices, size, size))
    row, column = np.tril_indices(size, -1)
    factor[:, :, row, column] = rng.standard_normal((draws, matrices, len(row)))
    factor[:, :, range(size), range(size)] = np.sqrt(squares)
    factor *= alive[:, None, :]
    rows = torch.from_numpy(factor)
    rows *= (lengths / torch.linalg.vector_norm(rows, dim=-1))[..., None]
    return rows @ rows.mT


def dimensions(history: History, steps: tuple[int, ...]) -> Tensor:
    """The directions that a walk of each moving matrix has, (M,), fp64: dense m n, LoRA ``factor_walk_dimension``."""
    found, last_two = [], (steps[-min(2, len(steps))], steps[-1])
    for name in history.names:
        before, now = (history.source.factors(name, step) for step in last_two)
        m, n = history.shapes[name]
        found.append(float(m * n) if now is None or before is None else factor_walk_dimension(now, before))
    return torch.tensor(found, dtype=torch.float64)


def factor_walk_dimension(now: LoraFactors, before: LoraFactors) -> float:
    """The participation ratio tr(C)^2 / tr(C^2) of the steps dB A + B dA, dA and dB isotropic.

    A (r, n), B (m, r). dA and dB have the mean square per entry that the last interval shows, a^2 and b^2. C is the
    covariance of vec(dB A + B dA): tr C = b^2 m |A|^2 + a^2 n |B|^2 and
    tr C^2 = b^4 m |A A^T|^2 + a^4 n |B^T B|^2 + 2 a^2 b^2 |A|^2 |B|^2. Two such steps have a mean squared cosine of one
    over it. It is at most m r while B is small, and never above r (m + n), about the dimension of the rank-r matrices.
    """
    A, B = now.A.double(), now.B.double()
    (r, n), m = A.shape, B.shape[0]
    a2, b2 = (A - before.A.double()).square().mean(), (B - before.B.double()).square().mean()
    left, right = A @ A.T, B.T @ B
    trace = b2 * m * left.trace() + a2 * n * right.trace()
    square = b2**2 * m * left.square().sum() + a2**2 * n * right.square().sum()
    square = square + 2 * a2 * b2 * left.trace() * right.trace()
    rank = min(r, m, n)
    return float(trace**2 / square) if square > 0 else float(rank * (m + n - rank))


def chunks(draws: int, lengths: Tensor) -> Iterator[tuple[int, int]]:
    """Split walks with step lengths (M, N) into parts that fit ``CHUNK_BYTES``: where each begins, and its size."""
    size = max(1, CHUNK_BYTES // (8 * max(1, lengths.numel()) * lengths.shape[1]))
    return ((start, min(size, draws - start)) for start in range(0, draws, size))


def median(values: Tensor, dim: int = -1) -> Tensor:
    """Return the median of what is not NaN, the mean of the middle two for an even count; NaN where nothing is left."""
    return quantile(values, 0.5, dim)


def quantile(values: Tensor, q: float, dim: int = -1) -> Tensor:
    """Return quantile q of what is not NaN, linear between neighbours; NaN where nothing is left."""
    ordered = values.movedim(dim, -1).sort(-1).values  # NaN last
    there = (~ordered.isnan()).sum(-1, keepdim=True)
    place = q * (there - 1).clamp_min(0).double()
    below, above = place.floor().long(), place.ceil().long()
    low, high = ordered.gather(-1, below), ordered.gather(-1, above)
    return torch.lerp(low, high, place - place.floor())[..., 0]

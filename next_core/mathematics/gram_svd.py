"""Singular triplets of a product left @ right^T from the small Gram matrices of its thin factors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.errors import NextCoreError

# Orthogonality a Cholesky factor may lose before a matrix is handed to another route; the singular values are then
# off by about as much, relatively. The bound is pessimistic.
_ORTHOGONALITY_LOSS = 1e-8
# Column norms below this come from squares that underflowed: such a column counts as zero.
_SMALLEST_NORM = 1e-146
_EPS = torch.finfo(torch.float64).eps
_RESIDUAL = 1e-9
"""Residual |D D^T u - sigma^2 u| / sigma^2 at which Lanczos stops; u is off by as much over the relative gap."""
_EXHAUSTED = 1e-13
"""A Lanczos coefficient at or below this part of sigma_1^2 ends the space: an eigenvector lies in it to rounding."""
_CHECKS = (8, 12, 16, 24, 32, 48, 64)
"""Iterations after which Lanczos looks at its residual; what has not converged by the last is decomposed whole."""


@dataclass(frozen=True, eq=False)
class LowRankGrams:
    """left^T left and right^T right, (N, p, p) each, of N matrices left @ right^T; fp64.

    ``noise`` (N,) is the squared norm at or below which a matrix cannot be told from the rounding of its Gram matrices;
    ``blur`` (N,) by how much more than their own size they are rounded, where they are differences of larger ones.
    """

    left: Tensor
    right: Tensor
    noise: Tensor
    blur: Tensor | None = None

    @property
    def width(self) -> int:
        """p."""
        return self.left.shape[-1]

    @property
    def energy(self) -> Tensor:
        """The squared Frobenius norms, (N,)."""
        return (self.left * self.right).sum((-2, -1)).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Solved:
    """N matrices decomposed: u_i = left @ ``left``[:, i] and v_i = right @ ``right``[:, i], to be normalised.

    left, right (N, p, k), S (N, k), energy (N,); ``spectrum`` (N, p) where all singular values are known; ``sound``
    (N,) is false where the Gram matrices do not carry the answer.
    """

    left: Tensor
    S: Tensor
    right: Tensor
    energy: Tensor
    spectrum: Tensor | None
    sound: Tensor

    @property
    def nuclear(self) -> Tensor | None:
        return None if self.spectrum is None else self.spectrum.sum(-1)


def triplets_from_grams(grams: LowRankGrams, k: int, spectrum: bool = False) -> Solved:
    """The leading k triplets; k = 1 without the ``spectrum`` takes a Krylov space in place of a decomposition.

    Raises ``NextCoreError`` for NaN or Inf.
    """
    if k > 1 or spectrum:
        solved = decompose(grams, k)
        sound = solved.sound & (solved.energy > grams.noise)
        return Solved(solved.left, solved.S, solved.right, solved.energy, solved.spectrum, sound)
    return _leading(grams)


def decompose(grams: LowRankGrams, k: int) -> Solved:
    """All singular values and the leading k triplets.

    left = P K D with column norms D, K the Cholesky factor of the scaled Gram matrix and P orthonormal up to
    eps |K^-1|^2; likewise right. The singular values are those of K_L D_L D_R K_R^T. A P off by delta moves
    each of them by a relative delta only, however small it is, so that this one number decides what is sound.
    """
    upper_l, map_l, norms_l, loss_l = _cholesky_basis(grams.left)
    upper_r, map_r, norms_r, loss_r = _cholesky_basis(grams.right)
    X, spectrum, Y = svd_of_core(upper_l, norms_l * norms_r, upper_r, k)
    sound = (loss_l + loss_r) * (1.0 if grams.blur is None else grams.blur) <= _ORTHOGONALITY_LOSS
    energy = spectrum.square().sum(-1)
    # The p x k products first: P itself is never formed.
    return Solved(map_l @ X, spectrum[:, :k], map_r @ Y, energy, spectrum, sound)


def svd_of_core(left: Tensor, weights: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """X (b, p, k), the spectrum less rounding noise, Y (b, q, k) of left diag(weights) right^T."""
    X, spectrum, Yh = torch.linalg.svd((left * weights[:, None, :]) @ right.mT, full_matrices=False)
    # Noise is relative to the products that were summed, not to sigma_1: they may have cancelled.
    noise = 8 * _EPS * math.sqrt(weights.shape[-1]) * torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
    return X[..., :k], torch.where(spectrum > noise, spectrum, 0.0), Yh.mT[..., :k]


def reciprocal(norms: Tensor) -> Tensor:
    """1 / norms, and 0 for what counts as zero."""
    return torch.where(norms > _SMALLEST_NORM, 1 / norms, 0.0)


def refuse_non_finite(*norms: Tensor) -> None:
    """Raise ``NextCoreError`` naming the matrices whose column norms (b, p) are not finite."""
    finite = torch.stack([x.isfinite().all(-1) for x in norms]).all(0)
    if not finite.all():
        where = (~finite).nonzero().flatten().tolist()
        raise NextCoreError(
            f"NaN, Inf or squares beyond float64 in the factors of matrices {where} of a batch of "
            f"{len(finite)}; is the checkpoint damaged, or did the run diverge?"
        )


def _cholesky_basis(squares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the Gram matrix of ``tall``: K (b, r, r), the map with tall @ map orthonormal, norms (b, r), loss (b,)."""
    norms = squares.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    refuse_non_finite(norms)
    scale = reciprocal(norms)
    # Scaling the Gram matrix scales the columns, without another pass over them. A zero column gets a 1 on
    # the diagonal, as if it had a dimension of its own; its weight in the core is zero.
    squares = squares * scale[:, :, None] * scale[:, None, :]
    squares.diagonal(dim1=-2, dim2=-1).fill_(1)
    lower, failed = torch.linalg.cholesky_ex(squares)
    identity = torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device).expand_as(lower)
    lower = torch.where((failed != 0)[:, None, None], identity, lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    loss = torch.where(failed != 0, math.inf, _EPS * inverse.square().sum((-2, -1)))
    return lower.mT, scale[:, :, None] * inverse.mT, norms, loss


def _leading(grams: LowRankGrams) -> Solved:
    """The leading triplet by Lanczos on right^T right left^T left, self-adjoint in the inner product of left^T left.

    Its eigenvectors x give u = left @ x and sigma v = right @ (left^T left x): neither side is ever orthogonalised. All
    N at once, with full reorthogonalisation; vectors are rows, which batched products read several times faster.
    """
    GL, GR = grams.left, grams.right
    count, p, _ = GL.shape
    energy = grams.energy
    refuse_non_finite(energy[:, None])
    alive = energy > grams.noise
    q = torch.randn(p, generator=torch.Generator().manual_seed(0), dtype=GL.dtype).to(GL.device).expand(count, 1, p)
    q = q @ GR  # in the range of right^T: what left makes of the rest is no part of the matrix
    Gq = q @ GL
    length = (q * Gq).sum(-1, keepdim=True).clamp_min(0).sqrt()
    inverse = reciprocal(length)
    q, Gq = q * inverse, Gq * inverse
    size = min(p, _CHECKS[-1])
    Q, P = GL.new_zeros(count, size, p), GL.new_zeros(count, size, p)
    T = GL.new_zeros(count, size, size)
    for j in range(size):
        Q[:, j : j + 1], P[:, j : j + 1] = q, Gq
        w = Gq @ GR
        for _ in range(2):
            h = w @ P[:, : j + 1].mT
            w = w - h @ Q[:, : j + 1]
            T[:, j, j] += h[:, 0, j]
        Gq = w @ GL
        beta = (w * Gq).sum(-1).clamp_min(0).sqrt()[:, 0]
        # What is left is rounding: the space is whole, and noise blown up to unit length is not to enter it.
        beta = torch.where(beta > _EXHAUSTED * T.diagonal(dim1=-2, dim2=-1).amax(-1), beta, 0.0)
        if j + 1 == size or j + 1 in _CHECKS:
            theta, s = torch.linalg.eigh(T[:, : j + 1, : j + 1])
            residual = beta * s[:, -1, -1].abs()
            done = (residual <= _RESIDUAL * theta[:, -1]) | ~alive
            if j + 1 == size or bool(done.all()):
                break
        T[:, j, j + 1] = T[:, j + 1, j] = beta
        scale = reciprocal(beta)[:, None, None]
        q, Gq = w * scale, Gq * scale
    top = s[:, None, :, -1]
    x, z = top @ Q[:, : j + 1], top @ P[:, : j + 1]
    if size == p:
        done = torch.ones_like(alive)  # the whole space was searched
    sigma = torch.where(alive, theta[:, -1].clamp_min(0).sqrt(), 0.0)
    return Solved(x.mT, sigma[:, None], z.mT, energy, None, alive & done)

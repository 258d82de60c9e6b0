"""Singular triplets of D = left @ right^T from the small Gram matrices left^T left and right^T right.

left (m, p) and right (n, p) are tall, p is a LoRA rank or twice that, so after two Gram matrices nothing of size m or n
is touched. A Gram matrix squares the condition number of its factor. In fp32 that would lose the small differences
between neighbouring checkpoints; everything here is fp64, and what even fp64 cannot resolve is reported as not sound.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.errors import NextCoreError

_ORTHOGONALITY_LOSS = 1e-8
"""Largest |P^T P - I| of a basis from Cholesky. Singular values are off by about as much (relative); a matrix with a
larger loss is not sound and takes another route. The estimate of the loss is pessimistic."""
_SMALLEST_NORM = 1e-146
"""Column norms below this count as zero: their squares, below 1e-292, lose digits to fp64's underflow."""
_EPS = torch.finfo(torch.float64).eps
_RESIDUAL = 1e-9
"""Lanczos stops at |D D^T u - sigma^2 u| <= this * sigma^2; the error of u is that over the relative gap to sigma_2."""
_EXHAUSTED = 1e-13
"""A Lanczos coefficient at or below this part of sigma_1^2 is rounding: the Krylov space contains an eigenvector."""
_CHECKS = (8, 12, 16, 24, 32, 48, 64)
"""Iterations after which Lanczos tests its residual (each test is an eigh); after the last it gives up."""


@dataclass(frozen=True, eq=False)
class LowRankGrams:
    """left^T left and right^T right, (N, p, p) each, fp64, of N matrices left @ right^T.

    ``noise_floor`` (N,): the squared norm at or below which a matrix is indistinguishable from the rounding of its
    Gram matrices. ``cancellation`` (N,): where a Gram matrix is a difference of larger ones, how much larger they were;
    its relative rounding error grows by that factor. None: no differences.
    """

    left: Tensor
    right: Tensor
    noise_floor: Tensor
    cancellation: Tensor | None = None

    @property
    def energy(self) -> Tensor:
        """The squared Frobenius norms, (N,): |D|^2 = tr(left^T left right^T right), an elementwise product."""
        return (self.left * self.right).sum((-2, -1)).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Triplets:
    """Singular triplets of N matrices as coefficients: u_i ~ left @ ``x``[:, i] and v_i ~ right @ ``y``[:, i].

    x, y (N, p, k); S (N, k) descending; energy (N,); ``spectrum`` (N, p) has all singular values, or None where only
    the first is known. The vectors still have to be normalised. ``sound`` (N,) is False where the Gram matrices do not
    determine the result to about 1e-8.
    """

    x: Tensor
    S: Tensor
    y: Tensor
    energy: Tensor
    spectrum: Tensor | None
    sound: Tensor

    @property
    def nuclear(self) -> Tensor | None:
        """The sum of all singular values, (N,), where the spectrum is known."""
        return None if self.spectrum is None else self.spectrum.sum(-1)


def triplets_from_grams(grams: LowRankGrams, k: int, spectrum: bool = False) -> Triplets:
    """Return the leading k triplets. k = 1 without ``spectrum`` uses Lanczos, several times faster than a full SVD.

    Raises ``NextCoreError`` for NaN or Inf.
    """
    if k > 1 or spectrum:
        found = decompose(grams, k)
        sound = found.sound & (found.energy > grams.noise_floor)
        return Triplets(found.x, found.S, found.y, found.energy, found.spectrum, sound)
    return _leading(grams)


def decompose(grams: LowRankGrams, k: int) -> Triplets:
    """Return all singular values and the leading k triplets.

    Write left = P K diag(d): d the column norms, K upper triangular from Cholesky of the scaled Gram matrix, P = left
    diag(1/d) K^-1 orthonormal. With the same for right, D = P_l (K_l diag(d_l d_r) K_r^T) P_r^T, so the p x p core in
    brackets has the singular values of D. An error delta in P^T P moves each singular value by a relative delta only,
    however small it is: that one number decides what is sound.
    """
    upper_l, map_l, norms_l, loss_l = _cholesky_basis(grams.left)
    upper_r, map_r, norms_r, loss_r = _cholesky_basis(grams.right)
    X, spectrum, Y = svd_of_core(upper_l, norms_l * norms_r, upper_r, k)
    # The loss assumes Gram matrices that are right to eps. Differences of larger ones are right to eps * cancellation.
    sound = (loss_l + loss_r) * (1.0 if grams.cancellation is None else grams.cancellation) <= _ORTHOGONALITY_LOSS
    energy = spectrum.square().sum(-1)
    # u = P X = left (diag(1/d) K^-1 X). Multiplying the small matrices first never forms P (m x p).
    return Triplets(map_l @ X, spectrum[:, :k], map_r @ Y, energy, spectrum, sound)


def svd_of_core(left: Tensor, weights: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return X (b, p, k), all singular values with noise set to 0, and Y (b, q, k) of left diag(weights) right^T."""
    X, spectrum, Yh = torch.linalg.svd((left * weights[:, None, :]) @ right.mT, full_matrices=False)
    # Rounding is relative to the terms that were added up, not to sigma_1: a - a is a sum of large terms, and every
    # singular value of the result is noise.
    noise = 8 * _EPS * math.sqrt(weights.shape[-1]) * torch.linalg.vector_norm(weights, dim=-1, keepdim=True)
    return X[..., :k], torch.where(spectrum > noise, spectrum, 0.0), Yh.mT[..., :k]


def reciprocal(norms: Tensor) -> Tensor:
    """Return 1 / norms, and 0 for norms that count as zero."""
    return torch.where(norms > _SMALLEST_NORM, 1 / norms, 0.0)


def refuse_non_finite(*norms: Tensor) -> None:
    """Raise ``NextCoreError`` that lists the matrices of a batch with column norms (b, p) that are not finite."""
    finite = torch.stack([x.isfinite().all(-1) for x in norms]).all(0)
    if not finite.all():
        where = (~finite).nonzero().flatten().tolist()
        raise NextCoreError(
            f"NaN, Inf or squares beyond float64 in the factors of matrices {where} of a batch of {len(finite)}; "
            "is the checkpoint damaged, or did the run diverge?",
            kind="numbers-not-finite",
        )


def _cholesky_basis(gram: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return K (b, p, p), the map diag(1/d) K^-1 (b, p, p), the column norms d (b, p) and the loss (b,).

    Columns are scaled to unit norm first. [B_t - B_s, B_s] has short and long columns, which alone would make the Gram
    matrix ill-conditioned although they are far from dependent; a unit diagonal is close to the best conditioning that
    any diagonal scaling reaches (van der Sluis 1969). The loss eps |K^-1|_F^2 estimates |P^T P - I|: the scaled Gram
    matrix has an error E of about eps, and P^T P - I = K^-T E K^-1.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    refuse_non_finite(norms)
    scale = reciprocal(norms)
    # Scaling the Gram matrix scales the columns without another pass over them. A zero column gets 1 on the
    # diagonal, as if it were orthogonal to all others; its weight in the core is zero.
    gram = gram * scale[:, :, None] * scale[:, None, :]
    gram.diagonal(dim1=-2, dim2=-1).fill_(1)
    lower, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(lower)
    lower = torch.where((failed != 0)[:, None, None], identity, lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    loss = torch.where(failed != 0, math.inf, _EPS * inverse.square().sum((-2, -1)))
    return lower.mT, scale[:, :, None] * inverse.mT, norms, loss


def _leading(grams: LowRankGrams) -> Triplets:
    """Return the leading triplet by Lanczos on M = G_r G_l, with G_l = left^T left and G_r = right^T right.

    M is not symmetric, but it is self-adjoint in the inner product <x, y> = x^T G_l y, since G_l M = G_l G_r G_l. In
    that inner product |x| = |left x|, so its unit eigenvectors x give unit vectors u = left x; the eigenvalues are
    sigma^2, and sigma v = right (G_l x). No basis of either side is computed. All N matrices run together, with full
    reorthogonalisation. Vectors are rows: batched products read rows several times faster than columns.
    """
    GL, GR = grams.left, grams.right
    count, p, _ = GL.shape
    energy = grams.energy
    refuse_non_finite(energy[:, None])
    alive = energy > grams.noise_floor
    # Random, so that it is orthogonal to no eigenvector; from a fixed seed, so that runs agree bit for bit.
    q = torch.randn(p, generator=torch.Generator().manual_seed(0), dtype=GL.dtype).to(GL.device).expand(count, 1, p)
    # Start in the range of G_r, which has every eigenvector with sigma > 0. The remaining directions only span the
    # null space, so they do not affect the product.
    q = q @ GR
    Gq = q @ GL
    length = (q * Gq).sum(-1, keepdim=True).clamp_min(0).sqrt()
    inverse = reciprocal(length)
    q, Gq = q * inverse, Gq * inverse
    size = min(p, _CHECKS[-1])
    # Rows of Q are the basis q_j and rows of P the products G_l q_j, so that inner products with the basis are w P^T.
    Q, P = GL.new_zeros(count, size, p), GL.new_zeros(count, size, p)
    T = GL.new_zeros(count, size, size)
    for j in range(size):
        Q[:, j : j + 1], P[:, j : j + 1] = q, Gq
        w = Gq @ GR
        for _ in range(2):  # one Gram-Schmidt pass leaves rounding along the basis; the second removes it
            h = w @ P[:, : j + 1].mT
            w = w - h @ Q[:, : j + 1]
            T[:, j, j] += h[:, 0, j]  # both passes: what the second removes belongs to the projection too
        Gq = w @ GL
        beta = (w * Gq).sum(-1).clamp_min(0).sqrt()[:, 0]
        # An exhausted space leaves a w of pure rounding. Scaled to unit length it would enter the space as a direction.
        beta = torch.where(beta > _EXHAUSTED * T.diagonal(dim1=-2, dim2=-1).amax(-1), beta, 0.0)
        if j + 1 == size or j + 1 in _CHECKS:
            theta, s = torch.linalg.eigh(T[:, : j + 1, : j + 1])
            # |M x - theta x| of a Ritz vector is beta times the last entry of its coefficients.
            residual = beta * s[:, -1, -1].abs()
            done = (residual <= _RESIDUAL * theta[:, -1]) | ~alive
            if j + 1 == size or bool(done.all()):
                break
        T[:, j, j + 1] = T[:, j + 1, j] = beta
        scale = reciprocal(beta)[:, None, None]
        q, Gq = w * scale, Gq * scale
    # y = G_l x without another product, since P holds the G_l q_j.
    top = s[:, None, :, -1]
    x, y = top @ Q[:, : j + 1], top @ P[:, : j + 1]
    if size == p:
        done = torch.ones_like(alive)  # the space is complete, so the result is exact
    sigma = torch.where(alive, theta[:, -1].clamp_min(0).sqrt(), 0.0)
    return Triplets(x.mT, sigma[:, None], y.mT, energy, None, alive & done)

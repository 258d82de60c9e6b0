"""Low-rank matrices kept as thin factors, and their exact singular triplets; no m x n matrix is ever formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from next_core.errors import NextCoreError

# Orthogonality the Gram route may lose before a matrix is handed to QR; singular values are then off by about as
# much, relatively. The bound is pessimistic, and QR costs only four times as much.
_ORTHOGONALITY_LOSS = 1e-8
# Column norms below this come from squares that underflowed: such a column counts as zero.
_SMALLEST_NORM = 1e-146
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``left @ right``: left (..., m, r), right (..., r, n), same leading batch dims; r may be 0.

    Raises ``NextCoreError`` if the shapes do not fit or a factor is not floating point.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if not (left.is_floating_point() and right.is_floating_point()):
            raise NextCoreError(f"low-rank factors must be floating point, not {left.dtype} and {right.dtype}")
        fits = left.ndim >= 2 and right.ndim >= 2 and left.shape[-1] == right.shape[-2]
        if not fits or left.shape[:-2] != right.shape[:-2]:
            raise NextCoreError(
                f"left {tuple(left.shape)} and right {tuple(right.shape)} do not multiply; "
                "want (..., m, r) and (..., r, n) with the same leading dimensions"
            )

    @classmethod
    def zero(
        cls, m: int, n: int, batch_shape: Sequence[int] = (), dtype: torch.dtype = torch.float64
    ) -> LowRank:
        """The zero matrix (*batch_shape, m, n), of rank 0."""
        return cls(torch.zeros(*batch_shape, m, 0, dtype=dtype), torch.zeros(*batch_shape, 0, n, dtype=dtype))

    @classmethod
    def stack(cls, parts: Sequence[LowRank]) -> LowRank:
        """A new leading batch dim of len(parts) matrices of one shape; smaller ranks are padded with zeros."""
        _same_shape(parts)
        rank = max(part.rank for part in parts)
        pad = torch.nn.functional.pad
        return cls(
            torch.stack([pad(part.left, (0, rank - part.rank)) for part in parts]),
            torch.stack([pad(part.right, (0, 0, 0, rank - part.rank)) for part in parts]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), without the batch."""
        return self.left.shape[-2], self.right.shape[-1]

    @property
    def rank(self) -> int:
        """r, the width of the factors: an upper bound of the matrix's rank."""
        return self.left.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dims."""
        return self.left.shape[:-2]

    def dense(self) -> Tensor:
        """The matrix itself, (..., m, n), in the factors' (promoted) dtype."""
        dtype = torch.promote_types(self.left.dtype, self.right.dtype)
        return self.left.to(dtype) @ self.right.to(dtype)

    def scale(self, alpha: float | Tensor) -> LowRank:
        """alpha times the matrix; a tensor alpha must broadcast to the batch shape."""
        if isinstance(alpha, Tensor):
            try:
                alpha = alpha.expand(self.batch_shape)[..., None, None]
            except RuntimeError as error:
                raise NextCoreError(
                    f"alpha {tuple(alpha.shape)} does not broadcast to the batch {tuple(self.batch_shape)}"
                ) from error
        return LowRank(self.left * alpha, self.right)

    def transpose(self) -> LowRank:
        """The transposed matrix, (..., n, m); the factors are views."""
        return LowRank(self.right.mT, self.left.mT)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Both factors in another dtype."""
        return LowRank(self.left.to(dtype), self.right.to(dtype))

    def __neg__(self) -> LowRank:
        return LowRank(-self.left, self.right)

    def __add__(self, other: LowRank) -> LowRank:
        return concatenate([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return concatenate([self, -other])


@dataclass(frozen=True, eq=False)
class Factors:
    """Singular triplets: U (..., m, k), S (..., k) descending and >= 0, V (..., n, k); a zero S has zero columns.

    ``energy`` (...) is the squared Frobenius norm of the whole matrix, not of the k triplets; ``nuclear`` (...) is
    the sum of all its singular values, or None where the full spectrum is not known. Raises ``NextCoreError`` if
    the shapes do not fit.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    energy: Tensor
    nuclear: Tensor | None

    def __post_init__(self) -> None:
        batch, k = self.S.shape[:-1], self.S.shape[-1:]
        fits = all(x.ndim >= 2 and x.shape[:-2] + x.shape[-1:] == batch + k for x in (self.U, self.V))
        fits = fits and self.energy.shape == batch
        if not fits or (self.nuclear is not None and self.nuclear.shape != batch):
            given = {name: None if x is None else tuple(x.shape) for name, x in vars(self).items()}
            raise NextCoreError(f"singular triplets of unlike shapes: {given}")

    @property
    def energy_ratio(self) -> Tensor:
        """sigma_1 / (sum of all sigma), (...), not squared: NExt's formula (arXiv 2604.11446). 0 for a zero matrix.

        Raises ``NextCoreError`` if the sum is not known.
        """
        if self.nuclear is None:
            raise NextCoreError(
                "energy_ratio needs the full spectrum, which a partial decomposition of a dense matrix does not give; "
                "use squared_energy_ratio"
            )
        return _ratio(self._sigma_1, self.nuclear)

    @property
    def squared_energy_ratio(self) -> Tensor:
        """sigma_1^2 / |A|_F^2, (...), the share of the energy in the first component. 0 for a zero matrix."""
        return _ratio(self._sigma_1.square(), self.energy)

    @property
    def _sigma_1(self) -> Tensor:
        return self.S[..., 0].to(self.energy.dtype) if self.S.shape[-1] else torch.zeros_like(self.energy)

    def lowrank(self) -> LowRank:
        """The rank-k matrix U diag(S) V^T."""
        return LowRank(self.U * self.S[..., None, :], self.V.mT)

    def flip(self, signs: Tensor) -> Factors:
        """U and V columns times signs (..., k) of +1 and -1: the same matrix."""
        signs = signs.to(self.U.dtype)[..., None, :]
        return Factors(self.U * signs, self.S, self.V * signs, self.energy, self.nuclear)


def concatenate(parts: Sequence[LowRank]) -> LowRank:
    """The exact sum of matrices of one shape and batch; ranks add up. Raises ``NextCoreError`` on unlike shapes."""
    _same_shape(parts)
    return LowRank(torch.cat([p.left for p in parts], -1), torch.cat([p.right for p in parts], -2))


def lora_difference(
    later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor], scaling: float | Tensor
) -> LowRank:
    """scaling (B_t A_t - B_s A_s) from ``later`` = (A_t, B_t) and ``earlier`` = (A_s, B_s), in float64, of rank 2r.

    A (..., r, n), B (..., m, r); a tensor scaling broadcasts to the batch. It is written
    [B_t - B_s, B_s] [A_t; A_t - A_s]: the small numbers are subtracted before any product, so that nothing cancels
    between neighbouring checkpoints. Raises ``NextCoreError`` on unlike shapes.
    """
    (a_later, b_later), (a_earlier, b_earlier) = later, earlier
    if a_later.shape != a_earlier.shape or b_later.shape != b_earlier.shape:
        raise NextCoreError(
            f"LoRA factors of unlike shapes: A {tuple(a_later.shape)}, B {tuple(b_later.shape)} and "
            f"A {tuple(a_earlier.shape)}, B {tuple(b_earlier.shape)}"
        )
    a_later, b_later, a_earlier, b_earlier = (
        x.detach().double() for x in (a_later, b_later, a_earlier, b_earlier)
    )
    moved_b = LowRank(b_later - b_earlier, a_later)
    moved_a = LowRank(b_earlier, a_later - a_earlier)
    return concatenate([moved_b, moved_a]).scale(scaling)


def gram(parts: Sequence[LowRank]) -> Tensor:
    """All Frobenius inner products <A_i, A_j> of T matrices of one shape: (..., T, T), float64, symmetric.

    tr((L_i^T L_j)(R_j R_i^T)) for all pairs at once: one L^T L, one R R^T, their elementwise product, block sums.
    Raises ``NextCoreError`` on unlike shapes.
    """
    _same_shape(parts)
    left = torch.cat([part.left.detach().double() for part in parts], -1)
    right = torch.cat([part.right.detach().double() for part in parts], -2)
    products = (left.mT @ left) * (right @ right.mT)
    ranks = torch.tensor([part.rank for part in parts], device=left.device)
    owner = torch.repeat_interleave(torch.arange(len(parts), device=left.device), ranks)
    member = torch.nn.functional.one_hot(owner, len(parts)).to(products.dtype)
    sums = member.mT @ products @ member
    return (sums + sums.mT) / 2


def inner(a: LowRank, b: LowRank) -> Tensor:
    """The Frobenius inner product <A, B>, (...), float64. Raises ``NextCoreError`` on unlike shapes."""
    _same_shape([a, b])
    left = a.left.detach().double().mT @ b.left.detach().double()
    right = a.right.detach().double() @ b.right.detach().double().mT
    return (left * right).sum((-2, -1))


def norm(a: LowRank) -> Tensor:
    """The Frobenius norm, (...), float64. Raises ``NextCoreError`` on NaN or Inf.

    From the singular values, not sqrt(inner(a, a)), which loses half the digits where the factors cancel.
    """
    return truncated_svd(a, 1).energy.sqrt()


def truncated_svd(a: LowRank, k: int, dtype: torch.dtype = torch.float64) -> Factors:
    """The exact leading singular triplets: ``Factors`` with min(k, m, n) columns, batched over the leading dims.

    U, S and V come in ``dtype`` (float32 or float64); all arithmetic, energy and nuclear are float64. Where sigma is
    zero to rounding (of the factors' products, so that a - a is zero) S is exactly 0, and so are the columns of U and
    V: unit vectors there would be LAPACK's choice, not the data's. Signs are arbitrary; see ``align_signs``.

    With K_L^T K_L = L^T L and K_R^T K_R = R R^T for columns scaled to unit norm, and D the scales, the singular
    values are those of the r x r core K_L D K_R^T. Matrices whose scaled factors are too ill-conditioned for Gram
    matrices take a QR of both factors instead. Raises ``NextCoreError`` on k < 1, another dtype, NaN or Inf.
    """
    if k < 1:
        raise NextCoreError(f"cannot take {k} singular triplets; ask for at least 1")
    if dtype not in (torch.float32, torch.float64):
        raise NextCoreError(f"singular triplets come in float32 or float64, not {dtype}")
    (m, n), r, batch = a.shape, a.rank, a.batch_shape
    count = batch.numel()
    left = a.left.detach().double().reshape(count, m, r)
    right = a.right.detach().double().mT.reshape(count, n, r)
    width = min(m, n, r)
    columns = min(k, m, n)
    if width == 0 or count == 0:
        spectrum, triplets = left.new_zeros(count, 0), (left.new_zeros(count, m, 0), left.new_zeros(count, n, 0))
    elif r > width:
        spectrum, triplets = _svd(*_qr_bases(left, right), min(columns, width))
    else:
        ...
    raise NotImplementedError

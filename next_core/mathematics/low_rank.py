"""Low-rank matrices as thin factors, and their exact singular triplets. No m x n matrix is formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from next_core.errors import NextCoreError, wrong_shape
from next_core.mathematics.gram_svd import LowRankGrams, decompose, reciprocal, refuse_non_finite, svd_of_core


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
            raise wrong_shape(f"low-rank factors must be floating point, not {left.dtype} and {right.dtype}")
        fits = left.ndim >= 2 and right.ndim >= 2 and left.shape[-1] == right.shape[-2]
        if not fits or left.shape[:-2] != right.shape[:-2]:
            raise wrong_shape(
                f"left {tuple(left.shape)} and right {tuple(right.shape)} do not multiply; "
                "they must be (..., m, r) and (..., r, n) with the same leading dimensions"
            )

    @classmethod
    def zero(cls, m: int, n: int, batch_shape: Sequence[int] = (), dtype: torch.dtype = torch.float64) -> LowRank:
        """Return the zero matrix (*batch_shape, m, n), of rank 0."""
        return cls(torch.zeros(*batch_shape, m, 0, dtype=dtype), torch.zeros(*batch_shape, 0, n, dtype=dtype))

    @classmethod
    def stack(cls, parts: Sequence[LowRank]) -> LowRank:
        """Stack matrices of one shape along a new leading dimension; smaller ranks are padded with zeros."""
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
        """r, the width of the factors, an upper bound on the matrix's rank."""
        return self.left.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions."""
        return self.left.shape[:-2]

    @property
    def T(self) -> LowRank:  # noqa: N802 - as tensors call it
        """The transposed matrix, (..., n, m)."""
        return LowRank(self.right.mT, self.left.mT)

    def dense(self) -> Tensor:
        """Return the whole matrix, (..., m, n), in the factors' (promoted) dtype."""
        dtype = torch.promote_types(self.left.dtype, self.right.dtype)
        return self.left.to(dtype) @ self.right.to(dtype)

    def scale(self, alpha: float | Tensor) -> LowRank:
        """Return alpha times the matrix; a tensor alpha must broadcast to the batch shape."""
        if isinstance(alpha, Tensor):
            try:
                alpha = alpha.expand(self.batch_shape)[..., None, None]
            except RuntimeError as error:
                raise wrong_shape(
                    f"alpha {tuple(alpha.shape)} does not broadcast to the batch {tuple(self.batch_shape)}"
                ) from error
        return LowRank(self.left * alpha, self.right)

    def norm(self) -> Tensor:
        """Return the Frobenius norm, (...)."""
        return inner(self, self).clamp_min(0).sqrt()

    def to(self, dtype: torch.dtype) -> LowRank:
        """Return the matrix with both factors in another dtype."""
        return LowRank(self.left.to(dtype), self.right.to(dtype))

    def __neg__(self) -> LowRank:
        return LowRank(-self.left, self.right)

    def __add__(self, other: LowRank) -> LowRank:
        return concatenate([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return concatenate([self, -other])


@dataclass(frozen=True, eq=False)
class Factors:
    """Singular triplets: U (..., m, k), S (..., k) descending, V (..., n, k); where S is 0, so are the columns.

    ``energy`` (...) is the squared Frobenius norm of the whole matrix, not only of the k triplets. ``nuclear`` (...) is
    the sum of all its singular values, or None where the full spectrum is not known. Raises ``NextCoreError`` if the
    shapes do not fit.
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
            raise wrong_shape(f"the shapes of these singular triplets do not fit: {given}")

    def rows(self, rows: list[int] | int) -> Factors:
        """Return the triplets of some matrices of the batch, by their index along the first leading dimension."""
        nuclear = None if self.nuclear is None else self.nuclear[rows]
        return Factors(self.U[rows], self.S[rows], self.V[rows], self.energy[rows], nuclear)

    @property
    def energy_ratio(self) -> Tensor:
        """sigma_1 / (sum of all sigma), (...), not squared, as in NExt (arXiv 2604.11446). 0 for a zero matrix.

        Raises ``NextCoreError`` if the sum is not known.
        """
        if self.nuclear is None:
            raise NextCoreError(
                "energy_ratio needs the full spectrum, which a partial decomposition does not give; "
                "use squared_energy_ratio",
                kind="numbers-partial-spectrum",
            )
        return _ratio(self._sigma_1, self.nuclear)

    @property
    def squared_energy_ratio(self) -> Tensor:
        """sigma_1^2 / |A|_F^2, (...), the first component's share of the energy. 0 for a zero matrix."""
        return _ratio(self._sigma_1.square(), self.energy)

    @property
    def _sigma_1(self) -> Tensor:
        return self.S[..., 0].to(self.energy.dtype) if self.S.shape[-1] else torch.zeros_like(self.energy)

    def lowrank(self) -> LowRank:
        """Return the rank-k matrix U diag(S) V^T."""
        return LowRank(self.U * self.S[..., None, :], self.V.mT)

    def batch(self) -> Factors:
        """Add a leading dimension of one."""
        nuclear = None if self.nuclear is None else self.nuclear[None]
        return Factors(self.U[None], self.S[None], self.V[None], self.energy[None], nuclear)

    def flip(self, signs: Tensor) -> Factors:
        """Multiply the columns of U and V by signs (..., k) of +1 and -1; the matrix is the same."""
        signs = signs.to(self.U.dtype)[..., None, :]
        return Factors(self.U * signs, self.S, self.V * signs, self.energy, self.nuclear)


def concatenate(parts: Sequence[LowRank]) -> LowRank:
    """Return the exact sum; ranks add up. Raises ``NextCoreError`` if shapes or batches differ."""
    _same_shape(parts)
    return LowRank(torch.cat([p.left for p in parts], -1), torch.cat([p.right for p in parts], -2))


def lora_difference(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor], scaling: float | Tensor) -> LowRank:
    """Return scaling (B_t A_t - B_s A_s), float64, of rank 2r; ``later`` is (A_t, B_t), ``earlier`` (A_s, B_s).

    A (..., r, n), B (..., m, r); a tensor scaling broadcasts to the batch. Raises ``NextCoreError`` if shapes differ.

    The result is [B_t - B_s, B_s] [A_t; A_t - A_s]. Between neighbouring checkpoints B_t A_t and B_s A_s agree in most
    digits, so their difference would lose them. Here the factors are subtracted before any product, where fp64 keeps
    every digit of fp32 values, and the two terms that remain are as small as the motion.
    """
    (a_later, b_later), (a_earlier, b_earlier) = later, earlier
    if a_later.shape != a_earlier.shape or b_later.shape != b_earlier.shape:
        raise wrong_shape(
            f"LoRA factors differ in shape: A {tuple(a_later.shape)}, B {tuple(b_later.shape)} and "
            f"A {tuple(a_earlier.shape)}, B {tuple(b_earlier.shape)}"
        )
    a_later, b_later, a_earlier, b_earlier = (x.detach().double() for x in (a_later, b_later, a_earlier, b_earlier))
    moved_b = LowRank(b_later - b_earlier, a_later)
    moved_a = LowRank(b_earlier, a_later - a_earlier)
    return concatenate([moved_b, moved_a]).scale(scaling)


def gram(parts: Sequence[LowRank]) -> Tensor:
    """Return all Frobenius inner products of T matrices of one shape: (..., T, T), float64, symmetric.

    <A_i, A_j> = tr((L_i^T L_j)(R_j R_i^T)). All pairs at once: with the factors side by side, take L^T L and R R^T,
    multiply them elementwise and sum each block. Raises ``NextCoreError`` if shapes differ.
    """
    _same_shape(parts)
    left = torch.cat([part.left.detach().double() for part in parts], -1)
    right = torch.cat([part.right.detach().double() for part in parts], -2)
    # tr(X Y^T) is the sum of X * Y, so no further product is needed.
    products = (left.mT @ left) * (right @ right.mT)
    ranks = torch.tensor([part.rank for part in parts], device=left.device)
    owner = torch.repeat_interleave(torch.arange(len(parts), device=left.device), ranks)
    member = torch.nn.functional.one_hot(owner, len(parts)).to(products.dtype)
    sums = member.mT @ products @ member
    return (sums + sums.mT) / 2  # rounding leaves the two halves different in the last bit


def inner(a: LowRank, b: LowRank) -> Tensor:
    """Return the Frobenius inner product <A, B>, (...), float64. Raises ``NextCoreError`` if shapes differ."""
    _same_shape([a, b])
    left = a.left.detach().double().mT @ b.left.detach().double()
    right = a.right.detach().double() @ b.right.detach().double().mT
    return (left * right).sum((-2, -1))


def norm(a: LowRank) -> Tensor:
    """Return the Frobenius norm, (...), float64. Raises ``NextCoreError`` on NaN or Inf.

    It comes from the singular values. ``a.norm()``, sqrt(<A, A>), is cheaper but loses half the digits where the terms
    of the product cancel.
    """
    return truncated_svd(a, 1).energy.sqrt()


def truncated_svd(a: LowRank, k: int) -> Factors:
    """Return the exact leading singular triplets: ``Factors`` with min(k, m, n) columns, for each matrix of the batch.

    All are float64. A sigma that is zero up to rounding (relative to the terms summed: a - a is zero) is set to exactly
    0, and so are its columns of U and V, because LAPACK would choose arbitrary unit vectors. Signs are arbitrary; see
    ``align_signs``. Columns of the factors with a norm below 1e-146 count as zero.

    The triplets come from Gram matrices of the thin factors; matrices whose factors are too ill-conditioned for that
    are decomposed by QR. Raises ``NextCoreError`` on k < 1, NaN or Inf.
    """
    if k < 1:
        raise NextCoreError(f"cannot compute {k} singular triplets; ask for at least 1", kind="config-invalid-value")
    (m, n), r, batch = a.shape, a.rank, a.batch_shape
    count, columns, width = batch.numel(), min(k, m, n), min(m, n, r)
    left = a.left.detach().double().reshape(count, m, r)
    right = a.right.detach().double().mT.reshape(count, n, r)
    if count == 0 or width == 0:
        svd = _Svd(left.new_zeros(count, m, 0), left.new_zeros(count, width), left.new_zeros(count, n, 0))
    elif r > width:  # more columns than rows are dependent, so their Gram matrix is singular
        svd = _svd_by_qr(left, right, columns)
    else:
        svd, sound = _svd_by_gram(left, right, columns)
        unsound = (~sound).nonzero().flatten()
        if unsound.numel():
            for batched, redone in zip(svd, _svd_by_qr(left[unsound], right[unsound], columns), strict=True):
                batched[unsound] = redone
    pad = torch.nn.functional.pad
    U, V = (pad(x, (0, columns - x.shape[-1])) for x in (svd.U, svd.V))
    S = pad(svd.spectrum, (0, max(0, columns - width)))[:, :columns]
    energy, nuclear = svd.spectrum.square().sum(-1), svd.spectrum.sum(-1)
    return Factors(
        U.reshape(*batch, m, columns),
        S.reshape(*batch, columns),
        V.reshape(*batch, n, columns),
        energy.reshape(batch),
        nuclear.reshape(batch),
    )


def dense(delta: LowRank | Tensor) -> Tensor:
    """Return a delta as a whole matrix (..., m, n)."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def concatenate_batches(parts: Sequence[Factors]) -> Factors:
    """Join batches (N_i, ...) of equal shapes into one; ``nuclear`` is known if every part knows it."""
    if len(parts) == 1:
        return parts[0]
    nuclear = [part.nuclear for part in parts if part.nuclear is not None]
    return Factors(
        torch.cat([part.U for part in parts]),
        torch.cat([part.S for part in parts]),
        torch.cat([part.V for part in parts]),
        torch.cat([part.energy for part in parts]),
        torch.cat(nuclear) if len(nuclear) == len(parts) else None,
    )


def align_signs(factors_over_time: Factors, reference: Factors | None = None) -> Factors:
    """Choose the sign of each component for continuity over time (the leading dimension T), newest row first.

    An SVD fixes (u, v) only up to a common sign, so the signs of successive rows are unrelated, and a line or network
    over time would fit their flips. Afterwards <u_t, u_s> + <v_t, v_s> >= 0, where s is the next later row whose
    component is not zero. The newest such row is aligned with ``reference`` (without dimension T); without one it keeps
    its sign. The walk begins at the newest row because a prediction continues from there, and old rows, which are
    short and noisy, must not decide its sign. Raises ``NextCoreError`` if the reference has another shape than a row.
    """
    U, S, V = factors_over_time.U, factors_over_time.S, factors_over_time.V
    if reference is not None and (reference.U.shape != U.shape[1:] or reference.V.shape != V.shape[1:]):
        raise wrong_shape(
            f"the reference U {tuple(reference.U.shape)}, V {tuple(reference.V.shape)} does not fit the rows of "
            f"U {tuple(U.shape)}, V {tuple(V.shape)}"
        )
    if S.shape[0] == 0:
        return factors_over_time
    newest_first = range(S.shape[0] - 1, -1, -1)
    alive = S > 0
    # Per row and component: the next later row that is not zero. Row T is the reference.
    later = torch.full(S.shape, S.shape[0], device=S.device)
    for t in newest_first[1:]:
        later[t] = torch.where(alive[t + 1], t + 1, later[t + 1])
    agreement = torch.zeros_like(S)
    last_U, last_V = (U[0] * 0, V[0] * 0) if reference is None else (reference.U.to(U), reference.V.to(V))
    for own, last in ((U, last_U), (V, last_V)):
        neighbour = torch.cat([own, last[None]]).gather(0, later[..., None, :].expand_as(own))
        agreement += torch.einsum("...ik,...ik->...k", own, neighbour)
    # A row's flip is relative to its neighbour, which may be flipped itself: the product over all later rows.
    flips = torch.where(alive & (agreement < 0), -1.0, 1.0)
    return factors_over_time.flip(flips.flip(0).cumprod(0).flip(0))


class _Svd(NamedTuple):
    """U (b, m, k), all singular values (b, width) in descending order, V (b, n, k)."""

    U: Tensor
    spectrum: Tensor
    V: Tensor


def _svd_by_gram(left: Tensor, right: Tensor, k: int) -> tuple[_Svd, Tensor]:
    """Return triplets of left (b, m, r) @ right (b, n, r)^T with r <= min(m, n), and which are sound (b,)."""
    found = decompose(LowRankGrams(left.mT @ left, right.mT @ right, noise_floor=left.new_zeros(len(left))), k)
    assert found.spectrum is not None
    U, V = left @ found.x, right @ found.y
    return _Svd(unit_columns(U, found.spectrum), found.spectrum, unit_columns(V, found.spectrum)), found.sound


def _svd_by_qr(left: Tensor, right: Tensor, k: int) -> _Svd:
    """Return the same for any r and any conditioning, by Householder QR of both factors.

    Columns are scaled to unit norm and their norms moved into the core, as in ``decompose``: QR's errors are relative
    to each column then, and a short column next to a long one keeps its digits.
    """
    norms_l, norms_r = (torch.linalg.vector_norm(x, dim=-2) for x in (left, right))
    refuse_non_finite(norms_l, norms_r)
    (Q_l, upper_l), (Q_r, upper_r) = (
        torch.linalg.qr(x * reciprocal(norms)[:, None, :]) for x, norms in ((left, norms_l), (right, norms_r))
    )
    X, spectrum, Y = svd_of_core(upper_l, norms_l * norms_r, upper_r, k)
    return _Svd(unit_columns(Q_l @ X, spectrum), spectrum, unit_columns(Q_r @ Y, spectrum))


def unit_columns(x: Tensor, spectrum: Tensor) -> Tensor:
    """Scale columns (b, d, k) to unit norm where their sigma (b, k or more) is positive, and set others to zero."""
    unit = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return torch.where(spectrum[:, None, : x.shape[-1]] > 0, unit, 0.0)


def _same_shape(parts: Sequence[LowRank]) -> None:
    if not parts:
        raise wrong_shape("no low-rank matrices were given, so their shape is unknown; use LowRank.zero")
    shapes = [(*part.batch_shape, *part.shape) for part in parts]
    for shape in shapes:
        if shape != shapes[0]:
            raise wrong_shape(f"low-rank matrices differ in shape: {shapes[0]} and {shape}")


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)

"""Low-rank arithmetic and its singular triplets agree with dense float64 arithmetic."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from next_core.mathematics.low_rank import (
    Factors,
    LowRank,
    align_signs,
    concatenate,
    gram,
    inner,
    lora_difference,
    norm,
    truncated_svd,
)
from tests.errors import raises_kind
from tests.predictors.trajectories import noise


def orthonormal(seed: int, m: int, r: int) -> Tensor:
    Q: Tensor = torch.linalg.qr(noise(seed, m, r)).Q
    return Q


def with_spectrum(sigma: Tensor, m: int, n: int) -> LowRank:
    return LowRank(orthonormal(1, m, len(sigma)) * sigma, orthonormal(2, n, len(sigma)).T)


def assert_triplets_of(dense: Tensor, found: Factors, vectors: int | None = None) -> None:
    """Sigma to 1e-6 of sigma_1; the first ``vectors`` singular vectors to 1e-5, up to a common sign."""
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    k = found.S.shape[-1]
    assert (found.S - S[..., :k]).abs().max() <= 1e-6 * S.max()
    assert (found.energy - dense.square().sum((-2, -1))).abs().max() <= 1e-6 * S.max() ** 2
    assert found.nuclear is not None
    assert (found.nuclear - S.sum(-1)).abs().max() <= 1e-6 * S.sum(-1).max()
    vectors = vectors or k
    U, V = U[..., :vectors], Vh.mT[..., :vectors]
    sign = (found.U[..., :vectors] * U).sum(-2, keepdim=True).sign()
    assert (found.U[..., :vectors] * sign - U).norm(dim=-2).max() <= 1e-5
    assert (found.V[..., :vectors] * sign - V).norm(dim=-2).max() <= 1e-5


@st.composite
def matrices(draw: st.DrawFn, count: int = 1) -> list[LowRank]:
    """``count`` matrices of one shape; some with columns of unlike size, zero or repeated columns."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    batch = draw(st.sampled_from([(), (2,)]))
    made = []
    for _ in range(count):
        r, seed = draw(st.integers(0, 16)), draw(st.integers(0, 2**31))
        left, right = noise(seed, *batch, m, r), noise(seed + 1, *batch, r, n)
        kind = draw(st.sampled_from(["plain", "scaled", "zero column", "repeated column"]))
        if kind == "scaled":
            left = left * 10 ** (3 * noise(seed + 2, r))
        if kind == "zero column" and r:
            left[..., 0] = 0
        if kind == "repeated column" and r:
            left[..., -1] = left[..., 0]
        made.append(LowRank(left, right))
    return made


any_matrix = matrices().map(lambda made: made[0])
properties = settings(deadline=None, max_examples=100)


@properties
@given(any_matrix, st.integers(1, 14))
def test_the_triplets_are_those_of_the_dense_matrix(a: LowRank, k: int) -> None:
    dense, found = a.dense(), truncated_svd(a, k)
    m, n = a.shape
    columns = min(k, m, n)
    assert found.U.shape == (*a.batch_shape, m, columns)
    assert found.S.shape == (*a.batch_shape, columns)
    assert found.V.shape == (*a.batch_shape, n, columns)
    sigma = torch.linalg.svdvals(dense)
    scale = sigma.amax(-1, keepdim=True)
    assert ((found.S - sigma[..., :columns]).abs() <= 1e-6 * scale).all()
    # Ties and tiny gaps leave single vectors undetermined, but never what they must do: A v = sigma u.
    for product, wanted in (
        (dense @ found.V, found.U * found.S[..., None, :]),
        (dense.mT @ found.U, found.V * found.S[..., None, :]),
    ):
        assert ((product - wanted).norm(dim=-2) <= 1e-6 * scale).all()
    gone = found.S == 0
    assert int((~gone).sum(-1).max()) <= a.rank
    for vectors in (found.U, found.V):
        assert torch.allclose(vectors.mT @ vectors, torch.diag_embed((~gone).double()), rtol=0, atol=1e-6)
        assert not (vectors * gone[..., None, :]).any()


@properties
@given(any_matrix)
def test_a_matrix_minus_itself_is_exactly_zero(a: LowRank) -> None:
    found = truncated_svd(a - a, 3)
    assert found.nuclear is not None
    assert not any(x.any() for x in (found.U, found.S, found.V, found.energy, found.nuclear))
    assert not norm(a - a).any()
    assert not found.energy_ratio.any()
    assert not found.squared_energy_ratio.any()


@properties
@given(matrices(3))
def test_inner_products_and_norms_are_those_of_the_dense_matrices(parts: list[LowRank]) -> None:
    dense = torch.stack([part.dense() for part in parts], -3)
    wanted = torch.einsum("...tij,...sij->...ts", dense, dense)
    size = torch.stack([part.left.norm(dim=(-2, -1)) * part.right.norm(dim=(-2, -1)) for part in parts], -1)
    room = 1e-13 * size[..., :, None] * size[..., None, :]
    found = gram(parts)
    assert ((found - wanted).abs() <= room).all()
    assert torch.equal(found, found.mT)
    assert ((inner(parts[0], parts[1]) - wanted[..., 0, 1]).abs() <= room[..., 0, 1]).all()
    assert ((norm(parts[2]) - wanted[..., 2, 2].sqrt()).abs() <= 1e-12 * size[..., 2]).all()


@properties
@given(matrices(2), st.floats(-3, 3))
def test_arithmetic_is_that_of_the_dense_matrices(parts: list[LowRank], alpha: float) -> None:
    a, b = parts
    for found, wanted in (
        (a + b, a.dense() + b.dense()),
        (a - b, a.dense() - b.dense()),
        (-a, -a.dense()),
        (a.scale(alpha), alpha * a.dense()),
        (a + LowRank.zero(*a.shape, a.batch_shape), a.dense()),
        (concatenate([a, b, a]), 2 * a.dense() + b.dense()),
        (LowRank.stack([a, b]), torch.stack([a.dense(), b.dense()])),
    ):
        assert found.shape == wanted.shape[-2:]
        assert found.batch_shape == wanted.shape[:-2]
        largest = max(x.abs().max().item() if x.numel() else 0.0 for x in (a.left, b.left))
        torch.testing.assert_close(found.dense(), wanted, rtol=0, atol=1e-11 * (1 + largest))


def test_inner_products_of_single_precision_are_taken_in_double() -> None:
    a, b = (LowRank(noise(seed, 9, 2), noise(seed + 1, 2, 7)).to(torch.float32) for seed in (0, 2))
    for other in (b, b.to(torch.float64)):
        found = inner(a, other)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, (a.to(torch.float64).dense() * b.to(torch.float64).dense()).sum())


def test_a_batch_is_scaled_matrix_by_matrix() -> None:
    a = LowRank(noise(0, 2, 5, 3), noise(1, 2, 3, 4))
    alpha = torch.tensor([2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(a.scale(alpha).dense(), alpha[:, None, None] * a.dense())


@pytest.mark.parametrize("decades", [0, 3, 7])
def test_a_spread_spectrum_is_found_to_its_end(decades: int) -> None:
    sigma = torch.logspace(0.3, -decades, 16, dtype=torch.float64)
    a = with_spectrum(sigma, 200, 150)
    found = truncated_svd(a, 16)
    assert_triplets_of(a.dense(), found)
    torch.testing.assert_close(found.S, sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("decades", [2, 4, 8, 12])
def test_ill_conditioned_factors_lose_nothing(decades: int) -> None:
    mix = orthonormal(3, 16, 16) * torch.logspace(0, -decades, 16, dtype=torch.float64) @ orthonormal(4, 16, 16)
    a = with_spectrum(torch.logspace(0, -1, 16, dtype=torch.float64), 200, 150)
    ill = LowRank(a.left @ mix, a.right)
    found = truncated_svd(ill, 4)
    assert_triplets_of(ill.dense(), found, vectors=2)
    for vectors in (found.U, found.V):
        assert (vectors.norm(dim=-2) - 1).abs().max() <= 1e-14


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-8])
def test_a_small_lora_step_does_not_cancel(step: float) -> None:
    A, B, spread = noise(1, 16, 150), noise(2, 200, 16), torch.logspace(0, -2, 16, dtype=torch.float64)
    A_t, B_t = A + step * spread[:, None] * noise(3, 16, 150), B + step * noise(4, 200, 16) * spread
    found = lora_difference((A_t, B_t), (A, B), 0.5)
    wanted = 0.5 * ((B_t - B) @ A_t + B @ (A_t - A))
    assert_triplets_of(wanted, truncated_svd(found, 4))
    exact = 0.5 * (B_t @ A_t - B @ A)
    assert (found.dense() - exact).abs().max() <= 1e-12


def test_a_lora_step_is_taken_in_double_precision() -> None:
    A, B = noise(1, 4, 9).float(), noise(2, 8, 4).float()
    A_t, B_t = A * (1 + 2**-20), B * (1 + 2**-21)
    found = lora_difference((A_t, B_t), (A, B), torch.tensor(2.0))
    wanted = 2 * (B_t.double() @ A_t.double() - B.double() @ A.double())
    assert found.left.dtype == found.right.dtype == torch.float64
    torch.testing.assert_close(found.dense(), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_double_precision(dtype: torch.dtype) -> None:
    a = LowRank(noise(0, 3, 60, 8), noise(1, 3, 8, 50)).to(dtype)
    found = truncated_svd(a, 2)
    assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float64
    assert_triplets_of(a.left.double() @ a.right.double(), found, vectors=1)


def test_the_energy_ratios_of_triplets_in_single_precision_keep_the_precision_of_the_energy() -> None:
    found = truncated_svd(LowRank(noise(0, 9, 3), noise(1, 3, 7)), 2)
    single = Factors(found.U.float(), found.S.float(), found.V.float(), found.energy, found.nuclear)
    assert single.energy_ratio.dtype == single.squared_energy_ratio.dtype == torch.float64


@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_and_infinity_are_refused_by_the_matrix_that_holds_them(side: str, value: float, rank: int) -> None:
    factors = {"left": noise(0, 3, 6, rank), "right": noise(1, 3, rank, 5)}
    factors[side][1, 0, 0] = value
    with raises_kind("numbers-not-finite", "matrices [1]"):
        truncated_svd(LowRank(**factors), 1)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_energy_ratios_follow_their_formulas(size: float) -> None:
    found = truncated_svd(with_spectrum(torch.tensor([3 * size, size], dtype=torch.float64), 6, 5), 1)
    assert found.energy_ratio.item() == pytest.approx(3 / 4)
    assert found.squared_energy_ratio.item() == pytest.approx(9 / 10)
    with raises_kind("numbers-partial-spectrum", "squared_energy_ratio"):
        _ = Factors(found.U, found.S, found.V, found.energy, None).energy_ratio


def drifting(T: int = 6) -> Factors:
    """Components that turn slowly over time, so that neighbours agree in sign."""
    a = LowRank(noise(0, 30, 3) + 0.05 * noise(1, T, 30, 3).cumsum(0), noise(2, 3, 20).expand(T, 3, 20))
    spread = torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64)
    return align_signs(truncated_svd(LowRank(a.left * spread, a.right), 3))


def row(factors: Factors, t: int) -> Factors:
    return Factors(factors.U[t], factors.S[t], factors.V[t], factors.energy[t], None)


@properties
@given(st.lists(st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3), min_size=6, max_size=6))
def test_alignment_forgets_the_signs_it_was_given(signs: list[list[float]]) -> None:
    smooth = drifting()
    aligned = align_signs(smooth.flip(torch.tensor(signs)), reference=row(smooth, -1))
    assert torch.equal(aligned.U, smooth.U)
    assert torch.equal(aligned.V, smooth.V)
    unreferenced = align_signs(smooth.flip(torch.tensor(signs)))
    assert torch.equal(unreferenced.U, smooth.U * torch.tensor(signs[-1]))


@pytest.mark.parametrize("gone", [[2], [2, 3], [5], [4, 5], [0]])
def test_the_walk_carries_the_last_component_past_zero_ones(gone: list[int]) -> None:
    smooth = drifting()
    kept = torch.ones(6, 3, dtype=torch.float64)
    kept[gone, 1] = 0
    thinned = Factors(
        smooth.U * kept[:, None], smooth.S * kept, smooth.V * kept[:, None], smooth.energy, smooth.nuclear
    )
    signs = noise(7, 6, 3).sign()
    aligned = align_signs(thinned.flip(signs), reference=row(smooth, -1))
    assert torch.equal(aligned.U, thinned.U)
    assert torch.equal(aligned.V, thinned.V)


def test_a_reference_of_another_shape_is_refused_and_a_history_without_rows_needs_none() -> None:
    assert align_signs(truncated_svd(LowRank.zero(6, 5, (0,)), 2)).U.shape == (0, 6, 2)
    with raises_kind("numbers-shape", "(29, 3)", "(6, 30, 3)"):
        align_signs(drifting(), truncated_svd(LowRank(noise(0, 29, 3), noise(1, 3, 20)), 3))
    narrow = truncated_svd(LowRank(noise(0, 30, 3), noise(1, 3, 19)), 3)
    with raises_kind("numbers-shape", "(19, 3)", "(6, 20, 3)"):
        align_signs(drifting(), narrow)


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (lambda: LowRank.zero(4, 3) + LowRank.zero(5, 3), ("(4, 3)", "(5, 3)")),
        (lambda: LowRank.zero(4, 3) - LowRank.zero(5, 3), ("(4, 3)", "(5, 3)")),
        (lambda: inner(LowRank.zero(4, 3), LowRank.zero(5, 3)), ("(4, 3)", "(5, 3)")),
        (lambda: gram([LowRank.zero(4, 3), LowRank.zero(5, 3)]), ("(4, 3)", "(5, 3)")),
        (lambda: LowRank.stack([LowRank.zero(4, 3), LowRank.zero(5, 3)]), ("(4, 3)", "(5, 3)")),
        (lambda: concatenate([LowRank.zero(4, 3, (2,)), LowRank.zero(4, 3)]), ("(2, 4, 3)", "(4, 3)")),
        (lambda: concatenate([]), ()),
        (lambda: LowRank.zero(4, 3, (2,)).scale(torch.ones(3)), ("(3,)", "(2,)")),
        (lambda: LowRank(torch.zeros(4, 2), torch.zeros(3, 5)), ("(4, 2)", "(3, 5)")),
        (lambda: LowRank(torch.zeros(2, 4, 3), torch.zeros(3, 5)), ("(2, 4, 3)", "(3, 5)")),
        (lambda: LowRank(torch.zeros(2), torch.zeros(2, 5)), ("(2,)",)),
        (lambda: LowRank(torch.zeros(4, 2), torch.zeros(2)), ("(2,)",)),
        (lambda: LowRank(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, 5)), ("int64",)),
        (lambda: lora_difference(lora(2), lora(3), 1.0), ("(2, 5)", "(4, 2)", "(3, 5)", "(4, 3)")),
        # These would broadcast.
        (lambda: lora_difference(lora(2), (torch.zeros(2, 1), lora(2)[1]), 1.0), ("(2, 1)",)),
        (lambda: lora_difference(lora(2), (lora(2)[0], torch.zeros(1, 2)), 1.0), ("(1, 2)",)),
        *(
            (lambda changed=changed: factors(**changed), ("(3,)",))
            for changed in (
                {"S": torch.zeros(3)},
                {"V": torch.zeros(3)},
                {"energy": torch.zeros(3)},
                {"nuclear": torch.zeros(3)},
            )
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(operation: Callable[[], object], shapes: tuple[str, ...]) -> None:
    with raises_kind("numbers-shape", *shapes):
        operation()


def lora(r: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(r, 5), torch.zeros(4, r)


def factors(**changed: Tensor) -> Factors:
    right = {"U": torch.zeros(4, 2), "S": torch.zeros(2), "V": torch.zeros(5, 2), "energy": torch.zeros(())}
    return Factors(**({"nuclear": None} | right | changed))


def test_at_least_one_triplet_is_asked_for() -> None:
    with raises_kind("config-invalid-value", "0"):
        truncated_svd(LowRank.zero(4, 3), 0)

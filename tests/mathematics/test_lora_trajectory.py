"""The triplets of many deltas from shared inner products equal those of each delta decomposed alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from next_core.mathematics import gram_svd
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, gram, truncated_svd
from next_core.types import LoraFactors, Span
from tests.errors import raises_kind

STEPS = (10, 20, 30, 40, 50, 60)
SPANS: list[Span] = [(t, None) for t in STEPS] + [(t, t - 10) for t in STEPS[1:]] + [(t, t - 30) for t in STEPS[3:]]


def factors_of(m: int, n: int, r: int, stride: float = 1e-2, seed: int = 0) -> dict[int, LoraFactors]:
    """Both factors walk with a drift; ``stride`` is the length of a step relative to the factors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B, dA, dB = draw(r, n), torch.zeros(m, r, dtype=torch.float64), draw(r, n), draw(m, r)
    made = {}
    for step in STEPS:
        A, B = A + stride * (dA + 0.3 * draw(r, n)), B + stride * (dB + 0.3 * draw(m, r))
        made[step] = LoraFactors(A, B, 2.0)
    return made


def exact(factors: dict[int, LoraFactors], span: Span, k: int, start: LoraFactors | None = None) -> Factors:
    def weight(step: int | None) -> Tensor:
        at = start if step is None else factors[step]
        return torch.zeros(()) if at is None else at.scaling * at.B @ at.A

    delta = weight(span[0]) - weight(span[1])
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Factors(U[:, :k], S[:k], Vh[:k].T, delta.square().sum(), S.sum())


def assert_same(found: Factors, row: int, wanted: Factors, rtol: float) -> None:
    torch.testing.assert_close(found.S[row], wanted.S, rtol=rtol, atol=0)
    torch.testing.assert_close(found.energy[row], wanted.energy, rtol=rtol, atol=0)
    agreement = (found.U[row] * wanted.U).sum(0) * (found.V[row] * wanted.V).sum(0)
    torch.testing.assert_close(agreement, torch.ones_like(agreement), rtol=0, atol=rtol)


@pytest.mark.parametrize(("k", "spectrum"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("shape", [(40, 30, 4), (12, 90, 5), (9, 8, 6)])
def test_every_span_has_the_triplets_of_its_dense_delta(shape: tuple[int, int, int], k: int, spectrum: bool) -> None:
    factors = factors_of(*shape)
    found = LoraTrajectory(factors).triplets(SPANS, k, spectrum)
    assert found.U.shape == (len(SPANS), shape[0], k)
    for row, span in enumerate(SPANS):
        wanted = exact(factors, span, k)
        assert_same(found, row, wanted, rtol=1e-9)
        if k > 1 or spectrum:
            assert wanted.nuclear is not None
            torch.testing.assert_close(found.nuclear[row], wanted.nuclear, rtol=1e-8, atol=0)
    assert (found.nuclear is None) == (k == 1 and not spectrum)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 6), st.integers(0, 10_000))
def test_any_shape_and_seed(m: int, n: int, r: int, seed: int) -> None:
    factors = factors_of(m, n, r, seed=seed)
    found = LoraTrajectory(factors).triplets(SPANS, 1)
    for row, span in enumerate(SPANS):
        wanted = exact(factors, span, 2)
        torch.testing.assert_close(found.S[row], wanted.S[:1], rtol=1e-9, atol=0)
        torch.testing.assert_close(found.energy[row], wanted.energy, rtol=1e-9, atol=0)
        # Of two equal singular values either direction is right: u must stretch as far as sigma says.
        u, v = found.U[row, :, 0], found.V[row, :, 0]
        W = LoraTrajectory(factors).delta(*span).dense()
        torch.testing.assert_close(u @ W @ v, found.S[row, 0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("stride", [1e-5, 1e-7, 1e-9])
def test_a_delta_too_short_for_the_differences_of_blocks_is_decomposed_from_its_own_factors(stride: float) -> None:
    factors = factors_of(40, 30, 4)
    at, moved = factors[50], factors_of(40, 30, 4, seed=1)[10]
    factors[60] = LoraFactors(at.A + stride * moved.A, at.B + stride * moved.B, 2.0)
    trajectory = LoraTrajectory(factors)
    found = trajectory.triplets([(60, 50)], 1)
    own = truncated_svd(trajectory.delta(60, 50), 1)
    torch.testing.assert_close(found.S[0], own.S, rtol=1e-6, atol=0)
    torch.testing.assert_close(trajectory.gram([(60, 50), (60, None)])[0, 0], own.energy, rtol=1e-6, atol=0)


def test_a_zero_delta_has_no_direction() -> None:
    factors = factors_of(40, 30, 4)
    factors[10], factors[60] = LoraFactors(factors[10].A, torch.zeros(40, 4), 2.0), factors[50]
    found = LoraTrajectory(factors).triplets([(60, 50), (50, 40), (10, None), (20, 10)], 1)
    assert (found.S > 0).flatten().tolist() == [False, True, False, True]
    assert not found.U[[0, 2]].any()
    assert not found.V[[0, 2]].any()


@pytest.mark.parametrize("began", [True, False])
def test_deltas_and_inner_products_count_from_the_adapter_that_rl_began_with(began: bool) -> None:
    factors = factors_of(40, 30, 4)
    factors[30] = LoraFactors(factors[30].A, factors[30].B, 3.0)  # each may have its own scaling
    start = LoraFactors(factors[10].A + 0.1, factors[10].B - 0.2, 2.0) if began else None
    trajectory = LoraTrajectory(factors, start)
    found = trajectory.triplets(SPANS, 1)
    for row, span in enumerate(SPANS):
        assert_same(found, row, exact(factors, span, 1, start), rtol=1e-9)
    torch.testing.assert_close(
        trajectory.gram(SPANS), gram([trajectory.delta(*span) for span in SPANS]), rtol=1e-9, atol=1e-12
    )


def test_equal_leading_singular_values_still_give_a_leading_direction() -> None:
    A, B = torch.eye(4, 30, dtype=torch.float64), torch.eye(40, 4, dtype=torch.float64)
    found = LoraTrajectory({10: LoraFactors(A, B, 2.0)}).triplets([(10, None)], 1)
    torch.testing.assert_close(found.S, torch.full_like(found.S, 2.0))
    torch.testing.assert_close(found.U[0, :, 0] @ (2 * B @ A) @ found.V[0, :, 0], found.S[0, 0])


def test_a_matrix_on_which_lanczos_fails_is_decomposed_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_svd, "_CHECKS", (2, 3))
    factors = factors_of(40, 30, 8)
    found = LoraTrajectory(factors).triplets(SPANS, 1)
    for row, span in enumerate(SPANS):
        assert_same(found, row, exact(factors, span, 1), rtol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_what_is_not_finite_is_refused_with_its_step(bad: float, side: str) -> None:
    factors = factors_of(40, 30, 4)
    A, B = factors[30].A.clone(), factors[30].B.clone()
    (A if side == "A" else B)[0, 0] = bad
    factors[30] = LoraFactors(A, B, 2.0)
    with raises_kind("numbers-not-finite", "step 30"):
        LoraTrajectory(factors).triplets(SPANS, 1)
    with raises_kind("numbers-not-finite", "step 30"):
        LoraTrajectory(factors).gram(SPANS)


def test_factors_of_different_shapes_are_refused() -> None:
    factors = factors_of(40, 30, 4)
    factors[30] = factors_of(40, 30, 5)[30]
    with raises_kind("numbers-shape", "step 30", "(5, 30)"):
        LoraTrajectory(factors)
    with raises_kind("numbers-shape"):
        LoraTrajectory({})


@pytest.mark.parametrize("k", [1, 3])
def test_small_singular_values_of_short_deltas_keep_their_digits(k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 80), (90, 6)))
    u, v = torch.randn(90, 2, generator=generator), torch.randn(2, 6, generator=generator)
    moved = 3e-3 * (u.double() * torch.tensor([1.0, 3e-4])) @ v.double()
    trajectory = LoraTrajectory({10: LoraFactors(A, B, 1.0), 20: LoraFactors(A, B + moved, 1.0)})
    found, exact_one = trajectory.triplets([(20, 10)], k), truncated_svd(trajectory.delta(20, 10), k)
    torch.testing.assert_close(found.S[0, : min(k, 2)], exact_one.S[: min(k, 2)], rtol=1e-8, atol=0)


def test_inner_products_of_deltas_in_which_the_factors_cancel_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(4)
    b, a, x, y = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (50, 40, 40, 40))
    steps = {
        step: LoraFactors(torch.stack([a, a + 1e-7 * move]), torch.stack([b, -b], 1), 1.0)
        for step, move in ((10, x), (20, y))
    }
    gram_matrix = LoraTrajectory(steps).gram([(10, None), (20, None)])
    expected = 1e-14 * b.dot(b) * torch.stack([torch.stack([p.dot(q) for q in (x, y)]) for p in (x, y)])
    torch.testing.assert_close(gram_matrix, expected, rtol=1e-6, atol=0)

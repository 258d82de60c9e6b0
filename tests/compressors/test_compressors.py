"""Compressors return the leading triplets to the accuracy that each promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.compressors.lanczos import LanczosCompressor
from next_core.mathematics.low_rank import LowRank
from next_core.plugins import make_compressor
from tests.errors import raises_kind

SPECTRUM = torch.tensor([3.0, 2.9, 1.0, 0.5, 0.1], dtype=torch.float64)


def matrix(m: int, n: int, spectrum: Tensor = SPECTRUM, noise: float = 1e-3, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, len(spectrum), generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, len(spectrum), generator=g, dtype=torch.float64))
    return (U * spectrum) @ V.T + noise * torch.randn(m, n, generator=g, dtype=torch.float64) / (m + n) ** 0.5


@pytest.mark.parametrize("name", ["exact", "lanczos"])
@pytest.mark.parametrize("shape", [(120, 80), (80, 120)])
@pytest.mark.parametrize("rank", [1, 3])
def test_dense_deltas_agree_with_lapack(name: str, shape: tuple[int, int], rank: int) -> None:
    deltas = [matrix(*shape, seed=seed) for seed in range(3)]
    found = make_compressor(name).compress(deltas, rank)
    assert found.U.shape == (3, shape[0], rank)
    assert found.V.shape == (3, shape[1], rank)
    for i, delta in enumerate(deltas):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        torch.testing.assert_close(found.S[i].double(), S[:rank], rtol=1e-6, atol=0)
        for k in range(rank):
            sign = torch.sign(found.U[i, :, k].double() @ U[:, k])
            assert (sign * found.U[i, :, k] - U[:, k]).norm() < 1e-5
            assert (sign * found.V[i, :, k] - Vh[k]).norm() < 1e-5
        torch.testing.assert_close(found.energy[i], delta.square().sum())


@pytest.mark.parametrize("name", ["exact", "lanczos"])
def test_a_zero_delta_has_no_direction(name: str) -> None:
    found = make_compressor(name).compress([torch.zeros(9, 7), matrix(9, 7)], 2)
    assert not found.U[0].any()
    assert not found.S[0].any()
    assert not found.V[0].any()
    assert found.S[1, 0] > 1


@pytest.mark.parametrize("name", ["exact", "lanczos"])
def test_factored_deltas_stay_factored(name: str) -> None:
    low = LowRank(torch.randn(30, 2), torch.randn(2, 20))
    found = make_compressor(name).compress([low, low], 2)
    torch.testing.assert_close(found.lowrank().dense()[1], low.dense().double(), atol=1e-5, rtol=1e-5)


def test_factored_and_dense_deltas_of_one_matrix_are_refused() -> None:
    with raises_kind("checkpoint-other-model"):
        ExactCompressor().compress([LowRank(torch.ones(3, 1), torch.ones(1, 3)), torch.ones(3, 3)], 1)


def test_lanczos_gives_the_same_bits_twice_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (make_compressor("lanczos").compress([matrix(60, 50)], 2) for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_wrong_lanczos_result_is_noticed_and_replaced_by_the_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LanczosCompressor._eigenvectors

    def off(self: LanczosCompressor, blocks: Any, scale: Tensor, k: int) -> Any:
        squares, V = real(self, blocks, scale, k)
        V[:, 0] += 0.01
        return squares, V

    delta = matrix(60, 50)
    monkeypatch.setattr(LanczosCompressor, "_eigenvectors", off)
    found = make_compressor("lanczos").compress([delta], 1)
    U, _, _ = torch.linalg.svd(delta, full_matrices=False)
    assert abs(float(found.U[0, :, 0].double() @ U[:, 0])) > 1 - 1e-9


def test_too_few_iterations_end_in_the_full_svd() -> None:
    delta = matrix(60, 50)
    assert make_compressor("lanczos", iterations=3).compress([delta], 1).nuclear is not None
    assert make_compressor("lanczos").compress([delta], 1).nuclear is None


@pytest.mark.parametrize("size", [1e-35, 1e-18, 1e18, 1e35])
def test_tiny_and_huge_deltas_neither_underflow_nor_overflow(size: float) -> None:
    delta = matrix(60, 50) * size
    found = make_compressor("lanczos").compress([delta], 1)
    torch.testing.assert_close(found.S[0], torch.linalg.svdvals(delta)[:1], rtol=1e-6, atol=0)


def test_directions_hold_where_the_second_singular_value_is_close() -> None:
    delta = matrix(300, 200, torch.tensor([1.0, 0.98, 0.9, 0.8, 0.7], dtype=torch.float64), noise=0.3)
    U, _, Vh = torch.linalg.svd(delta, full_matrices=False)
    found = make_compressor("lanczos").compress([delta.float()], 1)
    assert 1 - abs(float(found.U[0, :, 0] @ U[:, 0])) < 1e-10
    assert 1 - abs(float(found.V[0, :, 0] @ Vh[0])) < 1e-10


def test_a_delta_of_low_rank_has_its_triplets_and_zeros_beyond() -> None:
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(60, 2, generator=g) @ torch.randn(2, 50, generator=g)
    wanted = torch.linalg.svdvals(delta.double())[:2]
    torch.testing.assert_close(make_compressor("lanczos").compress([delta], 2).S[0], wanted, rtol=1e-5, atol=0)
    single = torch.zeros(60, 50, dtype=torch.float64)
    single[3, 4] = 2.0
    found = make_compressor("lanczos").compress([single], 3)
    torch.testing.assert_close(found.S[0], torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    assert not found.U[0, :, 1:].any()

"""Compressors: the leading triplets, right to the bound that each promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import next_core.compressors.lanczos as lanczos
from next_core.compressors.exact import ExactCompressor
from next_core.errors import CheckpointError
from next_core.lowrank import LowRank
from next_core.plugins import make_compressor

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
    with pytest.raises(CheckpointError, match="mixed"):
        ExactCompressor().compress([LowRank(torch.ones(3, 1), torch.ones(1, 3)), torch.ones(3, 3)], 1)


def test_lanczos_gives_the_same_bits_twice_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (make_compressor("lanczos").compress([matrix(60, 50)], 2) for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_rank_that_leaves_nothing_out_is_the_full_svd() -> None:
    found = make_compressor("lanczos").compress([matrix(7, 5)], 9)
    assert found.S.shape == (1, 5)


def test_what_lanczos_gets_wrong_is_found_out_and_done_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lanczos.svds

    def off(a: Any, **fields: Any) -> Any:
        u, s, vh = real(a, **fields)
        u[:, 0] += 0.01
        return u, s, vh

    delta = matrix(60, 50)
    monkeypatch.setattr(lanczos, "svds", off)
    found = make_compressor("lanczos").compress([delta], 1)
    U, _, _ = torch.linalg.svd(delta, full_matrices=False)
    assert abs(float(found.U[0, :, 0].double() @ U[:, 0])) > 1 - 1e-9

    def fails(a: Any, **fields: Any) -> Any:
        raise lanczos.ArpackError(-1)

    monkeypatch.setattr(lanczos, "svds", fails)
    again = make_compressor("lanczos").compress([delta], 1)
    torch.testing.assert_close(again.S, found.S)

"""Stochastic rounding: right on average, exact where it can be, never silently infinite."""

import math

import pytest
import torch
from torch import Tensor

from next_core.appliers.rounding import Rounder, Rounding, WrittenShare

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def rounder(dtype: torch.dtype, seed: int = 0, name: str = "a") -> Rounder:
    return Rounder("stochastic", dtype, seed, name)


def all_finite(dtype: torch.dtype) -> Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite()]


@HALVES
def test_values_that_can_be_stored_exactly_stay(dtype: torch.dtype) -> None:
    every = all_finite(dtype)
    for seed in range(5):
        assert torch.equal(rounder(dtype, seed)(every.float()).view(torch.int16), every.view(torch.int16))
    x = torch.rand(10)
    assert torch.equal(rounder(torch.float32)(x), x)


@HALVES
@pytest.mark.parametrize("value", [0.3, -1.7, 1234.567, -1e-3, 3.1e-6, 2.2e-8, -5e-8, 60000.7, 1e-40])
def test_the_mean_is_the_value_and_every_draw_a_neighbour(dtype: torch.dtype, value: float) -> None:
    count = 40_000
    x = torch.full((count,), value, dtype=torch.float32)
    found, exact = rounder(dtype)(x).double(), float(x[0])
    around = all_finite(dtype).double().unique()
    below, above = around[around <= exact].max().item(), around[around >= exact].min().item()
    assert {found.min().item(), found.max().item()} <= {below, above}
    if below < above:
        p = (exact - below) / (above - below)
        error = (found.mean().item() - exact) / (above - below)
        assert abs(error) <= 5 * math.sqrt(p * (1 - p) / count) + 1 / count


@HALVES
def test_the_draws_depend_on_seed_and_name_and_on_nothing_else(dtype: torch.dtype) -> None:
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rounder(dtype)(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, rounder(dtype)(x))
    for other in (rounder(dtype, seed=1), rounder(dtype, seed=2**32), rounder(dtype, name="b")):
        assert not torch.equal(first, other(x))
    in_blocks = rounder(dtype)
    assert torch.equal(first, torch.cat([in_blocks(x[:40]), in_blocks(x[40:])]))


@HALVES
def test_values_beyond_the_range_are_infinite_and_never_wrap(dtype: torch.dtype) -> None:
    for value in (math.inf, -math.inf, math.nan):
        assert not rounder(dtype)(torch.full((1000,), value)).isfinite().any()
    beyond = rounder(dtype)(torch.full((1000,), {torch.bfloat16: 3.4e38, torch.float16: 1e6}[dtype]))
    assert not beyond.isfinite().all()
    assert (beyond > 0).all()


@pytest.mark.parametrize(
    ("rounding", "shares"), [("nearest", (0.32, 0.55, 0.80, 0.94)), ("stochastic", (1.0, 1.0, 1.0, 1.0))]
)
def test_the_written_share_of_a_rank_1_jump_is_as_documented(rounding: Rounding, shares: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(1536, 1536, generator=generator)).bfloat16().float()
    u, v = (torch.randn(1536, 1, generator=generator) for _ in range(2))
    jump = 1.44e-5 * u @ v.T / (u @ v.T).square().mean().sqrt()
    for alpha, expected in zip((0.5, 1.0, 2.0, 4.0), shares, strict=True):
        share = WrittenShare()
        written = Rounder(rounding, torch.bfloat16, 0, "a")(weight + alpha * jump).float()
        share.add(written - weight, alpha * jump)
        assert share.value == pytest.approx(expected, abs=0.01)

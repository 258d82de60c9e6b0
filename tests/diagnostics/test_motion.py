"""Angles, displacement and speed, on paths whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from next_core.diagnostics.motion import (
    displacement_exponent,
    mean_squared_displacement,
    speed,
    speed_ratio,
    straightness,
    successive_cosines,
)
from next_core.diagnostics.nulls import isotropic_walks
from next_core.diagnostics.trajectory import Grid

EVEN = tuple(range(0, 160, 10))
UNEVEN = (0, 5, 10, 20, 40, 45, 60, 65, 90)


def line(times: tuple[int, ...]) -> Tensor:
    steps = torch.tensor(times, dtype=torch.float64).diff()
    return torch.outer(steps, steps)[None]


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
def test_a_straight_line_has_exponent_two_and_cosine_one(times: tuple[int, ...]) -> None:
    grams, grid = line(times), Grid(times)
    msd = mean_squared_displacement(grams, grid)
    assert torch.allclose(msd[0], torch.tensor(grid.lags).double().square())
    assert float(displacement_exponent(msd, grid)) == pytest.approx(2)
    assert torch.allclose(successive_cosines(grams), torch.ones(1, len(times) - 2).double())
    assert float(straightness(grams)) == pytest.approx(1)
    assert torch.allclose(speed(grams, grid), torch.ones(1, len(times) - 1).double())


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
def test_a_random_walk_in_many_dimensions_has_exponent_one_and_cosine_zero(times: tuple[int, ...]) -> None:
    lengths = torch.tensor(times, dtype=torch.float64).diff().sqrt()[None]
    grams = isotropic_walks(lengths, torch.tensor([1e9]), 1, np.random.default_rng(0))[0]
    grid = Grid(times)
    assert float(displacement_exponent(mean_squared_displacement(grams, grid), grid)) == pytest.approx(1, abs=1e-3)
    assert successive_cosines(grams).abs().max() < 1e-3


def test_the_displacement_is_that_of_the_points() -> None:
    points = torch.tensor([[0.0, 0], [1, 0], [1, 2], [0, 2], [4, 4]]).double()
    steps = points.diff(dim=0)
    grid = Grid((0, 1, 2, 3, 4))
    assert grid.lags == (1, 2)
    found = mean_squared_displacement((steps @ steps.T)[None], grid)[0].tolist()
    assert found == pytest.approx([(1 + 4 + 1 + 20) / 4, (5 + 5 + 13) / 3])


def test_turning_back_is_a_cosine_of_minus_one_and_standing_still_is_none() -> None:
    steps = torch.tensor([[1.0], [-1.0], [0.0], [2.0]]).double()
    found = successive_cosines((steps @ steps.T)[None])[0].tolist()
    assert found[0] == pytest.approx(-1)
    assert math.isnan(found[1])
    assert math.isnan(found[2])


def test_motion_that_slows_down_has_a_speed_ratio_below_one() -> None:
    steps = torch.tensor([4.0, 4, 2, 2, 1, 1]).double()
    grid = Grid((0, 10, 20, 30, 40, 50, 60))
    speeds = speed(torch.outer(steps, steps)[None], grid)
    assert speeds[0].tolist() == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1, 0.1])
    assert float(speed_ratio(speeds)) == pytest.approx(0.25)

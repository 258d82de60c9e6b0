"""Figures from inner products, against plain least squares on the points themselves and paths with known answers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from next_core.diagnostics.gram_figures import (
    displacement_exponent,
    gram_figures,
    line_in_sample,
    mean_squared_displacement,
    speed,
    speed_ratio,
    successive_cosines,
    time_components,
    walk_forward,
)
from next_core.diagnostics.random_walks import isotropic_walks
from next_core.diagnostics.trajectory import Grid
from tests.predictors.trajectories import noise

EVEN = (0, 10, 20, 30, 40, 50, 60, 70)
UNEVEN = (0, 5, 10, 20, 40, 45, 60, 65)


def steps_of(points: Tensor) -> Tensor:
    """The Gram matrix of the steps between points (N + 1, d), as one of a batch of one matrix."""
    steps = points.diff(dim=0)
    return (steps @ steps.T)[None]


def curve(times: tuple[int, ...]) -> Tensor:
    t = torch.tensor(times, dtype=torch.float64)[:, None]
    return t * noise(0, 1, 6) + 0.02 * t**1.7 * noise(1, 1, 6) + 3 * noise(2, len(times), 6)


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
def test_a_straight_line_has_every_figure_at_one_and_exponent_two(times: tuple[int, ...]) -> None:
    grid = Grid(times)
    points = grid.t[:, None] * noise(0, 1, 6)
    found, curves = gram_figures(steps_of(points), grid, grid.default_horizon())
    assert float(found.pop("msd_exponent")) == pytest.approx(2)
    assert found.keys() >= {"c1_r2", "top_1_share", "line_r2", "line_skill", "pinned_skill", "cosine_local"}
    assert torch.cat(list(found.values())).tolist() == pytest.approx([1] * len(found))
    lags = torch.tensor(grid.lags).double()
    assert torch.allclose(curves["msd"].values[0], (lags / lags[0]).square())
    assert torch.allclose(curves["cosine_local"].values, torch.ones(1, len(times) - 2).double())


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
def test_time_components_are_those_of_the_stacked_deltas(times: tuple[int, ...]) -> None:
    points = curve(times)
    found = time_components(steps_of(points), Grid(times))
    stacked = (points[1:] - points[0]).numpy()
    q, s, _ = np.linalg.svd(stacked, full_matrices=False)
    t, c = np.array(times[1:]), s[0] * q[:, 0]
    residual = c - np.polyval(np.polyfit(t, c, 1), t)
    assert float(found["c1_r2"]) == pytest.approx(1 - residual @ residual / ((c - c.mean()) ** 2).sum())
    assert float(found["top_1_share"]) == pytest.approx(s[0] ** 2 / (s**2).sum())
    assert float(found["top_5_share"]) == pytest.approx((s[:5] ** 2).sum() / (s**2).sum())
    assert float(found["top_1_of_top_5"]) == pytest.approx(s[0] ** 2 / (s[:5] ** 2).sum())


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
def test_the_line_through_all_points_is_least_squares(times: tuple[int, ...]) -> None:
    points = curve(times).numpy()
    fitted = np.stack([np.polyval(np.polyfit(times, column, 1), times) for column in points.T], 1)
    wanted = 1 - ((points - fitted) ** 2).sum() / ((points - points.mean(0)) ** 2).sum()
    assert float(line_in_sample(steps_of(torch.from_numpy(points)), Grid(times))["line_r2"]) == pytest.approx(wanted)


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
def test_walking_forward_fits_the_past_alone(times: tuple[int, ...]) -> None:
    points, grid = curve(times), Grid(times)
    found = walk_forward(steps_of(points), grid)
    W = points.numpy()
    for at, horizon in enumerate(grid.horizons):
        line = pinned = stay = 0.0
        targets = []
        for i in range(2, len(times)):
            if times[i] + horizon not in times:
                continue
            j = times.index(times[i] + horizon)
            b, a = np.polyfit(times[: i + 1], W[: i + 1], 1)
            line += ((a + b * times[j] - W[j]) ** 2).sum()
            pinned += ((W[i] + b * horizon - W[j]) ** 2).sum()
            stay += ((W[i] - W[j]) ** 2).sum()
            targets.append(W[j])
        assert float(found["line_skill"][0, at]) == pytest.approx(1 - line / stay)
        assert float(found["pinned_skill"][0, at]) == pytest.approx(1 - pinned / stay)
        spread = ((np.array(targets) - np.mean(targets, 0)) ** 2).sum()
        if len(targets) > 1:
            assert float(found["line_r2_out"][0, at]) == pytest.approx(1 - line / spread)
        else:
            assert math.isnan(found["line_r2_out"][0, at])


def test_a_random_walk_alone_has_the_published_in_sample_figures() -> None:
    """R2(c_1 ~ t) of 0.958 and a top-1/top-5 share of 0.844: the limits of many steps in many dimensions, where c_1 is
    a quarter of a sine and the eigenvalues fall as 1, 1/9, 1/25, ..."""
    count = 200
    walk = isotropic_walks(torch.ones(1, count), torch.tensor([1e9]), 4, np.random.default_rng(0))
    found = time_components(walk, Grid(tuple(range(count + 1))))
    assert float(found["c1_r2"].mean()) == pytest.approx(0.958, abs=0.002)
    assert float(found["top_1_of_top_5"].mean()) == pytest.approx(0.844, abs=0.002)
    assert float(found["top_1_share"].mean()) == pytest.approx(8 / math.pi**2, abs=0.003)


def test_what_stood_still_is_undefined_and_not_a_number_that_misleads() -> None:
    grams, grid = torch.zeros(1, 7, 7, dtype=torch.float64), Grid(EVEN)
    for value in (*time_components(grams, grid).values(), *walk_forward(grams, grid).values()):
        assert bool(value.isnan().all())


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

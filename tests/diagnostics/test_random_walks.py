"""Random walks drawn as Gram matrices, against random walks drawn as vectors."""

import numpy as np
import pytest
import torch

from next_core.diagnostics.random_walks import band, factor_walk_dimension, isotropic_walks
from next_core.types import LoraFactors
from tests.predictors.trajectories import noise


@pytest.mark.parametrize("dimension", [3, 6, 50])
def test_a_drawn_walk_has_the_observed_step_lengths_and_directions_of_its_dimension(dimension: int) -> None:
    lengths = torch.tensor([[1.0, 2.0, 0.5, 3.0, 1.0, 4.0]]).double()
    drawn = isotropic_walks(lengths, torch.tensor([float(dimension)]), 4000, np.random.default_rng(0))[:, 0]
    assert torch.allclose(drawn.diagonal(dim1=-2, dim2=-1).sqrt(), lengths.expand(4000, -1))
    assert torch.linalg.matrix_rank(drawn[0]) == min(6, dimension)
    cosines = drawn / (lengths.T @ lengths)
    off = cosines[:, ~torch.eye(6, dtype=torch.bool)]
    assert off.mean().abs() < 0.01
    # Of uniform directions in d dimensions: the mean squared cosine is 1 / d, the mean fourth power 3 / (d (d + 2)).
    assert float(off.square().mean()) == pytest.approx(1 / dimension, rel=0.05)
    assert float(off.pow(4).mean()) == pytest.approx(3 / (dimension * (dimension + 2)), rel=0.1)


def test_the_dimension_of_a_factor_walk_is_that_of_its_steps_cosines() -> None:
    m, n, r, a, b = 12, 10, 3, 0.05, 0.05  # both factors move the product by as much
    now = LoraFactors(noise(0, r, n), noise(1, m, r), 2.0)
    dA, dB = a * noise(2, 4000, r, n), b * noise(3, 4000, m, r)
    steps = (dB @ now.A + now.B @ dA).flatten(1)
    squares = (steps[:2000] * steps[2000:]).sum(1).square().mean()
    wanted = float(steps.square().sum(1).mean().square() / squares)
    before = LoraFactors(now.A - a * noise(4, r, n) / noise(4, r, n).square().mean().sqrt(), now.B, 2.0)
    before = LoraFactors(before.A, now.B - b * noise(5, m, r) / noise(5, m, r).square().mean().sqrt(), 2.0)
    assert factor_walk_dimension(now, before) == pytest.approx(wanted, rel=0.1)
    assert factor_walk_dimension(now, now) == r * (m + n - r)  # nothing moved: nothing to measure


def test_an_adapter_wider_than_its_matrix_walks_in_the_space_of_the_matrix() -> None:
    wide = LoraFactors(noise(0, 8, 2), torch.zeros(3, 8), 2.0)
    assert factor_walk_dimension(wide, wide) == 3 * 2


def test_an_interval_holds_95_percent_of_what_it_was_drawn_from() -> None:
    _, _, high = band(noise(0, 4000, 3))
    assert torch.allclose(high, torch.full((3,), 1.96).double(), atol=0.15)
    few = [band(noise(seed, 9)) for seed in range(400)]
    inside = sum(float(low) <= float(noise(10_000 + seed, 1)) <= float(high) for seed, (_, low, high) in enumerate(few))
    assert 0.92 < inside / 400 < 0.98

"""Energy ratios and turning directions, on matrices small enough to do by hand."""

import math

import numpy as np
import pytest
import torch

from next_core.diagnostics.triplet_figures import asymptotic, figures_of, mean_singular_value, sampled, triplet_figures
from next_core.mathematics.low_rank import Factors
from tests.diagnostics.runs import history, name, straight
from tests.predictors.trajectories import dense_run


def test_the_published_ratio_is_not_squared_and_the_other_is() -> None:
    """diag(3, 1): 3 / (3 + 1) is NExt's energy ratio, 9 / (9 + 1) the share of the energy."""
    run = dense_run({"a": lambda t: t * torch.diag(torch.tensor([3.0, 1.0])).double()}, (10, 20))
    found = triplet_figures(history(run))
    for kind in ("global", "local"):
        assert found[f"energy_ratio_{kind}"][0].tolist() == pytest.approx([0.75, 0.75])
        assert found[f"squared_energy_ratio_{kind}"][0].tolist() == pytest.approx([0.9, 0.9])


def test_a_rank_one_matrix_has_both_ratios_at_one_and_directions_that_stay() -> None:
    found = triplet_figures(history(straight()))
    assert set(found) == {
        f"{figure}_{kind}"
        for figure in ("energy_ratio", "squared_energy_ratio", "cosine_u", "cosine_v")
        for kind in ("global", "local")
    }
    for figure, value in found.items():
        shown = value[:, 1:] if figure.startswith("cosine") else value
        assert torch.allclose(shown, torch.ones_like(shown)), figure
        assert value.shape == (1, 15)


def test_a_matrix_that_turns_by_a_right_angle_has_a_cosine_of_zero() -> None:
    axes = {10: (0, 0), 20: (1, 1), 30: (2, 1)}

    def local(t: int) -> torch.Tensor:
        step = torch.zeros(3, 2, dtype=torch.float64)
        if t in axes:
            step[axes[t]] = 1.0
        return step

    run = dense_run({name(0): lambda t: sum((local(s) for s in axes if s <= t), local(0))}, tuple(axes))
    found = triplet_figures(history(run))
    assert found["cosine_u_local"][0, 1:].tolist() == pytest.approx([0.0, 0.0])
    assert found["cosine_v_local"][0, 1:].tolist() == pytest.approx([0.0, 1.0])


def test_without_the_spectrum_only_the_squared_ratio_is_known() -> None:
    sigma = torch.tensor([[2.0], [0.0]]).double()
    one = torch.ones(2, 1, 1).double()
    found = figures_of(Factors(one, sigma, one, torch.tensor([8.0, 0.0]).double(), None))
    assert float(found["squared_energy_ratio"][0]) == pytest.approx(0.5)
    assert math.isnan(found["squared_energy_ratio"][1])  # nothing moved: no ratio
    assert bool(found["energy_ratio"].isnan().all())


@pytest.mark.parametrize("shape", [(40, 60), (64, 64), (30, 400)])
def test_the_limits_of_large_matrices_agree_with_sampled_ones(shape: tuple[int, int]) -> None:
    drawn, limits = (draw(*shape, 400, np.random.default_rng(0)) for draw in (sampled, asymptotic))
    for one, other in zip(drawn, limits, strict=True):
        assert float(one.mean()) == pytest.approx(float(other.mean()), rel=0.015)
        assert 0.9 < float(other.std() / one.std()) < 1.45  # wider, if anything


def test_the_mean_singular_value_of_a_square_gaussian_matrix_is_the_quarter_circles() -> None:
    assert mean_singular_value(900, 900) / 30 == pytest.approx(8 / (3 * np.pi), rel=1e-3)

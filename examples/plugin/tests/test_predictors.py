"""The predictions of both predictors on runs whose future is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from next_core import History, make_predictor, registry
from next_core.mathematics.low_rank import dense
from next_core.testing import SyntheticRun, dense_run

NAME = "model.layers.0.up_proj.weight"


def moved(run: SyntheticRun, name: str, horizon: int, **settings: float) -> Tensor:
    """Return the predicted motion of the matrix NAME."""
    prediction = make_predictor(name, **settings).fit(History(run)).predict(horizon)
    return dense(prediction.delta(NAME))


def future(run: SyntheticRun, horizon: int) -> tuple[SyntheticRun, Tensor]:
    """Return the run without its last ``horizon`` steps, and the motion of the matrix NAME in them."""
    newest = run.steps[-1] - horizon
    motion = dense(run.delta(NAME, run.steps[-1], newest))
    return run.only([step for step in run.steps if step <= newest]), motion


@pytest.mark.parametrize("name", ["last-step", "parabola"])
def test_a_straight_run_is_continued_exactly(name: str) -> None:
    past, motion = future(dense_run(curvature=0.0, noise=0.0), 10)
    torch.testing.assert_close(moved(past, name, 10).to(motion.dtype), motion, atol=1e-6, rtol=1e-5)


def test_all_of_the_curvature_continues_a_parabola_exactly() -> None:
    past, motion = future(dense_run(curvature=1.0, noise=0.0), 10)
    found = moved(past, "parabola", 10, damping=1.0)
    torch.testing.assert_close(found.to(motion.dtype), motion, atol=1e-6, rtol=1e-5)
    straight = moved(past, "parabola", 10, damping=0.0)
    assert float((straight - motion).norm()) > 0.1 * float(motion.norm())


def test_both_are_found_by_their_names() -> None:
    assert {"last-step", "parabola"} <= set(registry().names("predictor"))

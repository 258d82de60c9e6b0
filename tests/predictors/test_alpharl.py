"""AlphaRL agrees with the formulas written out, and abstains where a regression would mean nothing."""

import functools
import math

import numpy as np
import pytest
import torch

from next_core.plugins import make_predictor
from next_core.predictor import Abstain
from next_core.sources.memory import MemorySource
from next_predictors.alpharl import invert
from tests.errors import raises_kind
from tests.predictors.trajectories import (
    EVERY_TEN,
    Metrics,
    curve,
    dense_run,
    drift,
    history,
    linear_lora_run,
    predicted_by,
    relative_error,
    resolve_dense,
)

predict = functools.partial(predicted_by, "alpharl")


def rewards(values: dict[int, float]) -> Metrics:
    return {step: {"reward": value} for step, value in values.items()}


def rising(steps: tuple[int, ...] = EVERY_TEN) -> Metrics:
    return rewards({t: 0.2 + 0.004 * t for t in steps})


def test_goes_where_the_metric_reaches_its_target() -> None:
    # Accuracy .2 + .004 t is .8 at step 150, 50 past the newest, whatever the horizon.
    source = dense_run({"a": drift(1)}, metrics=rising())
    for anchor in ("newest", "backbone"):
        prediction = predict(source, horizon=10, metric="reward", target=0.8, anchor=anchor)
        assert relative_error(resolve_dense(prediction, "a"), drift(1)(50)) < 1e-9


@pytest.mark.parametrize("anchor", ["backbone", "newest"])
@pytest.mark.parametrize("rank", [1, 2])
def test_agrees_with_the_formulas_written_out(rank: int, anchor: str) -> None:
    source = dense_run({"a": curve(1)})
    steps, y_target = np.array(EVERY_TEN, dtype=float), 130.0
    found = history(source, rank).components("global")["a"]
    rescaled = (found.energy / found.S.square().sum(-1)).sqrt()
    sides = [found.S[:, i, None] * found.U[:, :, i] for i in range(rank)]
    X = (rescaled[:, None] * torch.cat(sides, -1)).numpy()
    mean, scale = X.mean(0), X.std(0, ddof=1)
    Z = (X - mean) / scale
    w = Z.T @ (steps - steps.mean())
    z = Z @ (w / np.linalg.norm(w))
    p = Z.T @ z / (z @ z)
    a, b = np.polyfit(z, steps, 1)
    x = mean + scale * ((y_target - b) / a * p) - (X[-1] if anchor == "newest" else 0.0)
    x_target = torch.from_numpy(x).reshape(rank, 7)
    wanted = sum(torch.outer(x_target[i], found.V[-1, :, i]) for i in range(rank))
    update = predict(source, view_rank=rank, anchor=anchor).updates["a"]
    assert update.matrix.rank == rank
    torch.testing.assert_close(update.matrix.dense(), wanted, rtol=1e-9, atol=1e-12)


def test_rounding_noise_in_most_features_does_not_reach_the_others() -> None:
    rng, y = np.random.default_rng(0), np.arange(5.0)
    curved = np.stack([y**0.5, y**2], -1)
    noisy = np.hstack([curved, 3.0 + 1e-12 * rng.normal(size=(5, 500))])
    found, wanted = invert(noisy, y, 9.0, min_t=2.0), invert(curved, y, 9.0, min_t=2.0)
    assert not isinstance(found, Abstain)
    assert not isinstance(wanted, Abstain)
    np.testing.assert_allclose(found, [*wanted, *[3.0] * 500], rtol=1e-11)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([[1.0], [0.0], [1.0]], [0.0, 1.0, 2.0], "metric"),
        ([[1.0], [1.0], [1.0]], [0.0, 1.0, 2.0], "metric"),
        ([[0.0], [2.0], [0.1], [2.1]], [0.0, 0.0, 1.0, 1.0], "t = 0.07"),
    ],
)
def test_abstains_where_the_slope_may_be_0(x: list[list[float]], y: list[float], reason: str) -> None:
    found = invert(np.array(x), np.array(y), 3.0, min_t=2.0)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("values", "fields", "figures"),
    [
        (dict.fromkeys(EVERY_TEN, 0.3), {}, ("0.3",)),
        ({t: 0.1 * t for t in EVERY_TEN} | {40: math.nan, 70: math.inf}, {}, ("[40, 70]", "logged: reward")),
        ({t: 0.1 * t for t in EVERY_TEN if t > 20}, {}, ("[10, 20]",)),
        ({t: 0.2 + 0.004 * t for t in EVERY_TEN}, {"target": 0.1}, ("0.1", "+0.004")),
        ({t: 0.8 - 0.004 * t for t in EVERY_TEN}, {"target": 0.9}, ("0.9", "-0.004")),
    ],
    ids=["constant", "not finite", "logged late", "falling to", "rising to"],
)
def test_abstains_on_unfit_metrics(
    values: dict[int, float], fields: dict[str, float], figures: tuple[str, ...]
) -> None:
    source = dense_run({"a": drift(1), "b": drift(4)}, metrics=rewards(values))
    prediction = predict(source, metric="reward", **fields)
    assert not prediction.updates
    assert all(figure in (prediction.abstention or "") for figure in ("'reward'", *figures))


def test_the_checkpoint_of_step_0_needs_no_metric() -> None:
    source = linear_lora_run()
    logged = MemorySource(source._checkpoints, metrics=rising())
    prediction = predict(logged, metric="reward")
    torch.testing.assert_close(resolve_dense(prediction, "a"), resolve_dense(predict(source), "a"))


def test_a_target_needs_its_metric() -> None:
    with raises_kind("config-contradiction", "metric"):
        make_predictor("alpharl", target=0.5)

"""The secant's window, damping and space, and the gate's figures worked out by hand."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core.interfaces import Prediction
from tests.predictors.trajectories import (
    EVERY_TEN,
    curved_lora_run,
    dense_run,
    drift,
    predicted_by,
    resolve_dense,
    still,
    walk,
)

QUARTERS = (25, 50, 75)


predict = functools.partial(predicted_by, "secant", horizon=10)


def weights(prediction: Prediction, name: str = "a") -> dict[int, float]:
    update = prediction.updates[name]
    return dict(update.weights)


def bend(share: float, side: float = 0.0, before: float = 1.0) -> Callable[[int], Tensor]:
    """Over the steps 25 to 50 the matrix moves by ``before`` e_11, and over 50 to 75 by share e_11 + side e_22."""

    def path(t: int) -> Tensor:
        earlier, later = min(max(t - 25, 0), 25) / 25, max(t - 50, 0) / 25
        first = min(t, 25) / 25 + before * earlier + share * later
        return torch.diag(torch.tensor([first, side * later], dtype=torch.float64))

    return path


@pytest.mark.parametrize(
    ("steps", "horizon", "window", "wanted"),
    [
        (EVERY_TEN, 10, 50, {100: 0.2, 50: -0.2}),
        (EVERY_TEN, 20, None, {100: 1.0, 80: -1.0}),  # the window is the horizon
        ([50], 10, 50, {50: 0.2}),  # since the backbone
    ],
)
def test_it_continues_at_the_velocity_of_its_window(steps: Any, horizon: int, window: Any, wanted: Any) -> None:
    assert weights(predict(dense_run({"a": drift(1)}, steps), horizon=horizon, window=window)) == wanted


@pytest.mark.parametrize(("anchor", "wanted"), [("newest", {100: 0.25, 80: -0.25}), ("backbone", {100: 1.05})])
def test_damping_scales_the_motion_and_not_the_position(anchor: str, wanted: dict[int, float]) -> None:
    found = weights(predict(dense_run({"a": drift(1)}), horizon=20, damping=0.25, anchor=anchor))
    assert found == pytest.approx(wanted)


def test_it_extrapolates_the_factors_and_needs_no_step_0() -> None:
    prediction = predict(curved_lora_run(), horizon=30, window=20)
    assert weights(prediction) == {100: 1.5, 80: -1.5}
    at, before = (prediction.source.factors("a", t) for t in (100, 80))
    B, A = at.B + 1.5 * (at.B - before.B), at.A + 1.5 * (at.A - before.A)
    torch.testing.assert_close(resolve_dense(prediction, "a"), 2.0 * (B @ A - at.B @ at.A))


def test_names_the_windows_that_are_there() -> None:
    prediction = predict(dense_run({"a": drift(1)}, steps=[20, 40, 50]), window=25)
    assert all(figure in (prediction.abstention or "") for figure in ("25 steps before step 50", "[10, 30, 50]"))
    assert not prediction.updates


def test_a_window_that_reaches_the_backbone_needs_step_0_in_factor_space() -> None:
    kept, not_kept = curved_lora_run(steps=[0, 25, 50]), curved_lora_run(steps=[25, 50])
    assert weights(predict(kept, window=50)) == {50: 0.2, 0: -0.2}
    assert predict(not_kept, window=50).abstention is not None
    merged = [predict(source, window=50, space="merged") for source in (kept, not_kept)]
    torch.testing.assert_close(resolve_dense(merged[0], "a"), resolve_dense(merged[1], "a"))


def test_the_gate_follows_lambda_and_its_median() -> None:
    # P = e_11 and D = share e_11 + side e_22, so lambda is share; the median of (.5, .3, .1, .4, .45) is .4.
    shares = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.4, "e": 0.45}
    source = dense_run({name: bend(share, side=2.0) for name, share in shares.items()}, QUARTERS)
    prediction = predict(source, window=25, gate={})
    assert prediction.diagnostics == {"median_lambda": pytest.approx(0.4)}
    opening = (0.4 - 0.25) / 0.25
    wanted = {name: (shares[name] - 0.2) / 0.4 * opening for name in "abde"}
    assert prediction.confidence == pytest.approx(wanted)
    assert set(prediction.updates) == set(wanted)
    assert set(prediction.abstained) == {"c"}
    assert "0.100" in prediction.abstained["c"]
    assert prediction.abstention is None


@pytest.mark.parametrize(
    ("paths", "median", "open_"),
    [
        ({"a": bend(1.0, before=2.0)}, 0.5, True),  # lambda is relative to the earlier secant
        ({"a": drift(1), "b": drift(5)}, 1.0, True),
        ({"a": bend(0.6), "x": still(2, 2), "y": still(2, 2)}, 0.6, True),  # frozen matrices have none
        ({"a": bend(0.9), "b": bend(0.2), "c": bend(0.1)}, 0.2, False),
    ],
)
def test_the_gate_closes_for_all_on_a_low_median(paths: dict[str, Any], median: float, open_: bool) -> None:
    prediction = predict(dense_run(paths, QUARTERS), window=25, gate={})
    assert prediction.diagnostics == {"median_lambda": pytest.approx(median)}
    assert bool(prediction.updates) is open_
    assert open_ or f"median lambda {median:.3f}" in (prediction.abstention or "")


def test_the_gate_closes_on_a_random_walk() -> None:
    source = dense_run({name: walk(i) for i, name in enumerate("abcdef")})
    prediction = predict(source, window=20, gate={"window": 20})
    assert not prediction.updates
    assert abs(prediction.diagnostics["median_lambda"]) < 0.25


def test_the_gate_counts_the_backbone_as_the_checkpoint_of_step_0() -> None:
    path = bend(0.0, before=0.6)
    without = predict(dense_run({"a": path}, steps=[25, 50]), window=25, gate={})
    observed = predict(dense_run({"a": path}, steps=[0, 25, 50]), window=25, gate={})
    assert without.diagnostics == observed.diagnostics == {"median_lambda": pytest.approx(0.6)}
    assert without.abstention is None


def test_a_matrix_that_stood_still_before_has_no_lambda() -> None:
    # A billionth of the later motion is rounding, from which no lambda can be computed.
    late = {"late": bend(1.0, before=0.0), "rounding": bend(1.0, before=1e-9)}
    source = dense_run({"a": bend(0.5), "b": bend(0.6), **late}, QUARTERS)
    prediction = predict(source, window=25, gate={})
    assert prediction.diagnostics == {"median_lambda": pytest.approx(0.55)}
    assert set(prediction.abstained) == set(late)
    all_late = predict(dense_run({"late": bend(1.0, before=0.0)}, QUARTERS), window=25, gate={})
    assert "from step 25 to 50" in (all_late.abstention or "")


def test_the_gate_says_which_checkpoints_it_needs() -> None:
    source = dense_run({"a": drift(1)}, steps=[10, 20, 30])
    prediction = predict(source, window=10, gate={"window": 25})
    assert all(figure in (prediction.abstention or "") for figure in ("gate", "25 steps before step 30"))

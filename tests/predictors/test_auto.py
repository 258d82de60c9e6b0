"""The multiple of ``auto``: what raises and lowers it, where it is read from, and when it makes no jump."""

import math
from typing import Any

import pytest

from next_core.history.history import History
from next_core.interfaces import Prediction
from next_core.plugins import make_predictor
from next_core.sources.memory import MemorySource
from tests.predictors.trajectories import dense_run, drift, linear_lora_run, still, walk

EVERY_TWO = tuple(range(2, 42, 2))


def predict(
    source: MemorySource, tried: list[dict[str, Any]] | None = None, horizon: int = 2, **fields: Any
) -> Prediction:
    history = History(source)
    history.jump_log = tried or []
    return make_predictor("auto", **fields).fit(history).predict(horizon)


def record(multiple: float, measured: int, accepted: bool = True) -> dict[str, Any]:
    return {"accepted": accepted, "diagnostics": {"multiple": multiple, "measured": float(measured)}}


def test_a_straight_line_raises_the_multiple_by_its_agreement() -> None:
    for source in (dense_run({"a": drift(1)}, steps=EVERY_TWO), linear_lora_run(steps=(0, *EVERY_TWO))):
        prediction = predict(source)
        assert prediction.diagnostics["agreement"] == 1.0
        multiple = math.exp(1.0)  # gain 1.5 times .8 is more than the limit
        assert prediction.diagnostics["multiple"] == pytest.approx(multiple)
        update = prediction.updates["a"]
        assert dict(update.weights) == pytest.approx({40: multiple - 1, 38: 1 - multiple})
    assert update.space == "factors"


def test_it_continues_from_the_journals_last_multiple_up_to_the_largest() -> None:
    source = dense_run({"a": drift(1)}, steps=EVERY_TWO)
    assert predict(source, [record(2.0, 30)], gain=0.5).diagnostics["multiple"] == pytest.approx(2 * math.exp(0.4))
    assert predict(source, [record(8.0, 30)]).diagnostics["multiple"] == 9.0
    assert predict(source, [record(1.5, 20), record(2.0, 30)], gain=0.5).diagnostics["multiple"] > 2


def test_between_two_measurements_the_multiple_does_not_change() -> None:
    prediction = predict(dense_run({"a": drift(1)}, steps=EVERY_TWO), [record(3.0, 32)])
    assert prediction.diagnostics == {"multiple": 3.0, "measured": 32.0}


def test_a_jump_that_a_guard_refused_halves_it() -> None:
    source = dense_run({"a": drift(1)}, steps=EVERY_TWO)
    assert predict(source, [record(3.0, 38, accepted=False)]).diagnostics["multiple"] == 1.5
    assert predict(source, [record(1.5, 38, accepted=False)]).abstention is not None
    assert predict(source, [record(1.0, 38, accepted=False)]).diagnostics["multiple"] == 1.0  # its own abstention


def test_a_random_walk_gets_no_jump_and_lowers_a_large_multiple() -> None:
    paths = {name: walk(seed, 20, 20) for seed, name in enumerate("abcde")}
    source = dense_run(paths, steps=EVERY_TWO)
    alone = predict(source)
    assert alone.abstention is not None
    assert not alone.updates
    assert alone.diagnostics["multiple"] == 1.0
    assert abs(alone.diagnostics["agreement"]) < 0.15
    assert predict(source, [record(4.0, 30)]).diagnostics["multiple"] < 4.0


def test_motion_that_turns_back_lowers_the_multiple_by_the_limit() -> None:
    def there_and_back(t: int) -> Any:
        return min(t, 40 - t) * drift(3)(1)

    source = dense_run({"a": there_and_back}, steps=EVERY_TWO)
    multiple = predict(source, [record(9.0, 30)]).diagnostics["multiple"]
    assert multiple == pytest.approx(9 * math.exp(-1.0))


def test_with_per_matrix_each_matrix_has_a_multiple_in_the_journal() -> None:
    paths = {"straight": drift(1), "walk": walk(7, 20, 20)}
    source = dense_run(paths, steps=EVERY_TWO)
    first = predict(source, per_matrix=True)
    assert set(first.updates) == {"straight"}
    assert first.diagnostics["multiple of straight"] == pytest.approx(math.exp(1.0))
    assert first.diagnostics["multiple of walk"] < 1.02
    kept = {"accepted": True, "diagnostics": dict(first.diagnostics) | {"measured": 38.0}}
    again = predict(source, [kept], per_matrix=True)
    assert again.diagnostics["multiple of straight"] == pytest.approx(math.exp(1.0))
    assert set(again.updates) == {"straight"}
    refused = predict(source, [kept | {"accepted": False}], per_matrix=True)
    assert refused.diagnostics["multiple of straight"] == pytest.approx(math.exp(1.0) / 2)


@pytest.mark.parametrize(("steps", "horizon"), [((2, 4, 6, 8), 2), ((50, 100), 50), (EVERY_TWO, 2)])
def test_the_longest_comparable_motions_count_and_frozen_matrices_do_not(steps: Any, horizon: int) -> None:
    prediction = predict(dense_run({"a": drift(1), "b": still(), "c": still()}, steps=steps), horizon=horizon)
    assert prediction.diagnostics["agreement"] == 1.0
    assert set(prediction.updates) == {"a"}


def test_missing_checkpoints_are_named_before_a_run() -> None:
    auto = make_predictor("auto")
    assert "2 steps before step 20" in str(auto.why_not((10, 20), 2))
    assert "step 2;" in str(auto.why_not((2,), 2))
    assert auto.why_not((2, 4), 2) is None


def test_from_where_rl_began_it_goes_on_only_if_the_initial_adapter_was_kept() -> None:
    """Ordinary trainer checkpoints have no step 0: in factors, nothing can be said of the motion since."""
    without, kept = (predict(linear_lora_run(steps=steps), horizon=40) for steps in ((20, 40), (0, 20, 40)))
    assert without.abstention is not None
    assert "step 0" in without.abstention
    assert "--start" in without.abstention
    assert "space:" not in without.abstention, "it has no such setting"
    assert kept.updates

"""What is made of the races' curves, on curves whose figures can be worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from next_core.comparison.comparison_config import load_comparison
from next_core.comparison.comparison_results import SPLITS, collect, equals_step
from next_core.comparison.races import make_plan
from tests.comparison.test_config import written
from tests.errors import raises_kind


def result(last: int, rate: float, seed: int, seconds: float = 1.0, offset: float = 0.0) -> dict[str, Any]:
    """Accuracy rises by ``rate`` a step; validation is .01 lower, greedy .1 higher."""
    curve = []
    for step in range(0, last + 1, 10):
        value = 0.2 + rate * step + 0.01 * seed + (offset if step else 0.0)
        both = {"sampled": value, "greedy": value + 0.1}
        curve.append(
            {
                "step": step,
                "seconds": seconds * step,
                "test": both,
                "validation": {key: x - 0.01 for key, x in both.items()},
            }
        )
    return {"curve": curve, "accuracy": {}, "seconds": {"ours": 2.0}, "jumps": []}


def points(accuracies: dict[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "test": {"sampled": value}} for step, value in accuracies.items()]


def judged(folder: Path) -> dict[str, Any]:
    config, arms = load_comparison(written(folder))
    plan = make_plan(config, arms)
    rates = {"longer": 0.001, "no jump": 0.001, "random direction": 0.0005, "auto": 0.01}
    found = {}
    for race in plan.races:
        seed = race.config.seed
        if race.arm == "tuned":
            rate = {3e-4: 0.0012, 1e-3: 0.0014}[race.config.training.learning_rate]
        elif race.arm == "secant":  # alpha 2 validates best
            rate = {1: 0.001, 2: 0.0013, 4: 0.0011}[race.config.schedule.alpha]
        else:
            rate = rates[race.arm]
        found[race.folder] = result(race.config.steps, rate, seed)
    return collect(config, arms, found, plan, {}).as_dict()


def test_a_comparison_of_straight_curves(tmp_path: Path) -> None:
    found = judged(tmp_path)
    arms = found["arms"]
    assert next(iter(arms)) == "plain"
    plain, longer, secant, tuned = (arms[name] for name in ("plain", "longer", "secant", "tuned"))
    assert plain["test"]["sampled"]["mean"] == pytest.approx(0.305)
    assert plain["test"]["greedy"]["mean"] == pytest.approx(0.405)
    assert plain["difference"] is None
    assert plain["equals_step"]["mean"] == pytest.approx(100)
    assert longer["difference"]["mean"] == pytest.approx(0.06)
    assert secant["chosen"] == {"schedule.alpha": 2}
    assert [v["chosen"] for v in secant["variants"]] == [False, True, False]
    assert secant["difference"]["mean"] == pytest.approx(0.03)
    assert (secant["difference"]["low"], secant["difference"]["high"]) == (pytest.approx(0.03), pytest.approx(0.03))
    assert secant["equals_step"]["mean"] == pytest.approx(130)
    assert secant["steps_saved"]["mean"] == pytest.approx(30)
    assert secant["seconds_saved"]["mean"] == pytest.approx(30)
    assert (secant["spent_steps"], tuned["spent_steps"], plain["spent_steps"]) == (300, 200, 100)
    assert secant["icer"]["mean"] == pytest.approx(100 / 13)
    assert tuned["chosen"] == {"training.learning_rate": 1e-3}
    assert tuned["difference_longer"]["mean"] == pytest.approx(-0.02)
    assert arms["no jump"]["difference"]["mean"] == pytest.approx(0, abs=1e-12)
    assert arms["auto"]["beyond"] == 2
    assert arms["auto"]["equals_step"]["mean"] == 160
    assert secant["beyond"] == longer["beyond"] == plain["beyond"] == 0
    assert plain["curve"]["steps"][-1] == 100
    assert longer["curve"]["steps"][-1] == 160
    assert found["base"]["test"]["sampled"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("accuracy", "step"), [(0.1, 0.0), (0.2, 0.0), (0.25, 5.0), (0.3, 10.0), (0.35, 25.0), (0.4, 30.0)]
)
def test_the_step_that_is_as_good_is_the_first_on_a_curve_made_monotone(accuracy: float, step: float) -> None:
    curve = points({0: 0.2, 10: 0.31, 20: 0.29, 30: 0.4})  # the dip becomes two times .3
    assert equals_step(accuracy, curve, "sampled") == (pytest.approx(step), False)


def test_what_no_plain_step_reaches_is_beyond_and_a_plateau_is_reached_where_it_begins() -> None:
    assert equals_step(0.9, points({0: 0.2, 10: 0.3, 30: 0.4}), "sampled") == (30.0, True)
    assert equals_step(1.0, points({0: 0.2, 10: 1.0, 30: 1.0}), "sampled") == (10.0, False)


def test_an_accuracy_that_was_not_measured_is_named(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path, metric="greedy"))
    plan = make_plan(config, arms)
    found = {race.folder: result(race.config.steps, 0.001, race.config.seed) for race in plan.races}
    for one in found.values():
        one["curve"] = [p | {split: {"sampled": p[split]["sampled"]} for split in SPLITS} for p in one["curve"]]
    with raises_kind("config-contradiction", "greedy", "sampled"):
        collect(config, arms, found, plan, {})


def test_a_variant_that_failed_is_left_out_and_an_accuracy_that_is_no_number_counts_as_none(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    plan = make_plan(config, arms)
    found = {race.folder: result(race.config.steps, 0.001, race.config.seed) for race in plan.races}
    failed = next(race for race in plan.races if race.arm == "tuned" and race.variant == 1)
    del found[failed.folder]
    last = next(race for race in plan.races if race.arm == "auto")
    found[last.folder]["curve"][-1]["test"]["sampled"] = None
    arms_found = collect(config, arms, found, plan, {failed.title: "diverged"}).as_dict()["arms"]
    assert [v["values"] for v in arms_found["tuned"]["variants"]] == [{"training.learning_rate": 3e-4}]
    assert arms_found["auto"]["test"]["sampled"]["values"]["0"] == 0.0

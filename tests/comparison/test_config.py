"""Comparison configs: arms over a common run, values to choose among, and every wrong input named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from next_core.comparison.comparison_config import Arm, load_comparison
from next_core.comparison.races import make_plan
from tests.errors import raises_kind

EXAMPLES = Path(__file__).parents[2] / "examples"
TEST = EXAMPLES / "arithmetic" / "test.jsonl"


def written(folder: Path, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "base": str(EXAMPLES / "quickstart.yaml"),
        "run": {"schedule": {"alpha": 1}},
        "steps": 100,
        "longer": 160,
        "seeds": 2,
        "tuned": {"training.learning_rate": [3e-4, 1e-3]},
        "arms": {"secant": {"choose": {"schedule.alpha": [1, 2, 4]}}, "auto": {"predictor": "auto"}},
    }
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(raw | changes, sort_keys=False))
    return file


def arms_of(folder: Path, **changes: Any) -> dict[str, Arm]:
    return {arm.name: arm for arm in load_comparison(written(folder, **changes))[1]}


def test_controls_come_first_and_arms_differ_in_what_they_say(tmp_path: Path) -> None:
    arms = arms_of(tmp_path)
    assert list(arms) == ["plain", "longer", "tuned", "no jump", "random direction", "secant", "auto"]
    assert {arm.role for arm in arms.values()} == {"plain", "control", "arm"}
    plain = arms["plain"].variants[0].config
    assert (plain.steps, plain.predictor.name, plain.control, plain.measure_every) == (100, "stay", "none", 25)
    assert arms["longer"].variants[0].config.steps == 160
    assert [v.config.training.learning_rate for v in arms["tuned"].variants] == [3e-4, 1e-3]
    assert [v.config.schedule.alpha for v in arms["secant"].variants] == [1, 2, 4]
    assert {v.config.predictor.name for v in arms["secant"].variants} == {"secant"}
    assert arms["secant"].variants[0].config.schedule.observe == 50, "of the base"
    assert arms["no jump"].variants[0].config.predictor.fields == {"jump": True}
    assert arms["random direction"].variants[0].config.predictor.name == "random"


def test_a_predictor_with_a_schedule_of_its_own_does_not_take_the_common_one(tmp_path: Path) -> None:
    auto = arms_of(tmp_path)["auto"].variants[0].config
    assert (auto.schedule.every, auto.schedule.average, auto.guards.probe) == (5, 80, False)


def test_a_plug_in_is_replaced_as_a_whole(tmp_path: Path) -> None:
    arms = arms_of(tmp_path, arms={"other": {"predictor": {"name": "secant", "window": 20}}})
    assert arms["other"].variants[0].config.predictor.fields == {"window": 20}, "the base's gate is not there"


def test_paths_count_from_the_file_that_names_them(tmp_path: Path) -> None:
    training = arms_of(tmp_path)["plain"].variants[0].config.training
    assert training.model == EXAMPLES / "arithmetic" / "base"
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    own = arms_of(tmp_path, run={"training": {"data": {"train": "train.jsonl"}}})["plain"].variants[0].config
    assert own.training.data.train == tmp_path / "train.jsonl"
    assert own.training.data.test == EXAMPLES / "arithmetic" / "test.jsonl"


VALIDATION_IS_TEST = {"training": {"data": {"validation": str(TEST)}}}


@pytest.mark.parametrize(
    ("changes", "kind", "names"),
    [
        ({"seeds": []}, "config-contradiction", ["seeds"]),
        ({"seeds": [1, 1]}, "config-contradiction", ["seeds"]),
        ({"longer": 100}, "config-contradiction", ["longer (100)"]),
        ({"seeds": [True, 2]}, "config-invalid-value", ["seeds"]),
        ({"arms": {"Plain": {}}}, "config-contradiction", ["Plain"]),
        ({"arms": {"a": {}, "A": {}}}, "config-contradiction", ["A"]),
        ({"arms": {"b.": {}}}, "config-contradiction", ["b."]),
        ({"arms": {"a/b": {}}}, "config-contradiction", ["a/b"]),
        ({"arms": {"a": {"steps": 3}}}, "config-contradiction", ["arms.a.steps"]),
        ({"arms": {"a": {"choose": {"predictor": ["secant", "auto"]}}}}, "config-contradiction", ["predictor"]),
        ({"arms": {"a": {"choose": {"steps": [1, 2]}}}}, "config-contradiction", ["steps"]),
        ({"arms": {"a": {"choose": {"schedule.alpha": 2}}}}, "config-invalid-value", ["schedule.alpha"]),
        ({"arms": {"a": {"choose": ["schedule.alpha"]}}}, "config-invalid-value", ["choose"]),
        ({"arms": {"a": {"choose": {"schedule.alhpa": [1, 2]}}}}, "config-unknown-key", ["alhpa", "'alpha'"]),
        ({"arms": {"a": {"choose": {1: [1, 2]}}}}, "config-unknown-key", ["1"]),
        ({"tuned": {"training.learning_rate": [1e-3, 1e-3]}}, "config-invalid-value", ["training.learning_rate"]),
        ({"stesp": 3}, "config-unknown-key", ["stesp", "'steps'"]),
        ({"base": "gone.yaml"}, "config-missing-file", ["gone.yaml"]),
        ({"run": {"training": {"evaluation": "generate"}}}, "config-contradiction", ["metric: greedy"]),
        ({"run": VALIDATION_IS_TEST}, "config-contradiction", ["validation", "test"]),
        ({"run": {"training": {"data": {"test": None}}}}, "config-contradiction", ["validation", "test"]),
        ({"arms": {"a": {"schedule": {"observe": 500}}}}, "config-schedule", ["500"]),
        ({"arms": {"a": {"predictor": "sekant"}}}, "plugin-unknown", ["sekant", "'secant'"]),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, changes: dict[str, Any], kind: str, names: list[str]) -> None:
    with raises_kind(kind, *names):
        load_comparison(written(tmp_path, **changes))


def test_races_share_what_they_have_in_common(tmp_path: Path) -> None:
    config, arms = load_comparison(written(tmp_path))
    plan = make_plan(config, arms)
    # 2 seeds: longer, 2 rates, no jump, random, 3 alphas and auto; plain is a part of longer.
    assert len(plan.races) == 2 * 9
    assert [trunk.stops for trunk in plan.trunks] == [(49,)] * 2
    sharing = {"longer", "no jump", "random direction", "secant"}
    assert {race.arm for race in plan.races if race.trunk is not None} == sharing
    assert plan.shared == 2 * 5 * 49
    assert plan.steps == 2 * (160 + 2 * 100 + 5 * 51 + 100)
    assert len({race.folder for race in plan.races}) == len(plan.races)


def test_a_trunk_is_found_again_unless_its_steps_would_differ(tmp_path: Path) -> None:
    def trunks(**changes: Any) -> set[str]:
        return {trunk.folder for trunk in make_plan(*load_comparison(written(tmp_path, **changes))).trunks}

    fast = {"training": {"learning_rate": 1e-2}, "choose": {"schedule.alpha": [1, 2]}}
    before = trunks(arms={"fast": fast})
    assert len(before) == 2 * 2
    assert trunks(arms={"faster": fast | {"training": {"learning_rate": 2e-2}}, "fast": fast}) > before
    assert trunks(arms={"fast": fast}, seeds=1) < before
    assert not trunks(arms={"fast": fast}, run={"training": {"beta": 0.1}}) & before


def test_controls_of_a_run_that_brings_its_schedule_have_it_too_but_not_its_mean(tmp_path: Path) -> None:
    base = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())
    del base["schedule"]
    base["training"]["model"] = str(EXAMPLES / "arithmetic" / "base")
    base["training"]["data"] = {k: str(EXAMPLES / v) for k, v in base["training"]["data"].items()}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | {"predictor": "auto"}))
    arms = arms_of(tmp_path, base="base.yaml", run={}, arms={"auto": {}})
    for name in ("plain", "random direction"):
        schedule = arms[name].variants[0].config.schedule
        assert (schedule.every, schedule.jump_every, schedule.average) == (2, 2, None)
    assert arms["auto"].variants[0].config.schedule.average == 80


def test_what_would_not_be_the_same_run_alone_shares_nothing(tmp_path: Path) -> None:
    def shared(**changes: Any) -> int:
        return make_plan(*load_comparison(written(tmp_path, tuned={}, controls=[], **changes))).shared

    one = {"name": "secant", "window": 10}
    assert shared(arms={"a": {"predictor": one}}) == 2 * 49
    assert shared(arms={"a": {"predictor": {"name": "alpharl", "metric": "reward"}}}) == 0
    trend = {"guards": {"recovery": 10, "against": "trend"}, "schedule": {"settle": 10}}
    assert shared(arms={"a": {"predictor": one} | trend}) == 0
    assert shared(arms={"a": {"backend": {"name": "trl", "args": {"num_iterations": 2}}}}) == 0
    assert shared(arms={"a": {"predictor": one}}, run={"training": {"lr_scheduler": "linear"}}) == 0
    early = {"predictor": one, "schedule": {"observe": 5, "every": 5, "horizon": 5, "jump_every": 5}}
    assert shared(arms={"a": early | {"predictor": {"name": "secant", "window": 5}}}) == 0


def test_plain_is_cut_from_the_longer_run_only_where_it_was_measured(tmp_path: Path) -> None:
    def plain(**changes: Any) -> int:
        plan = make_plan(*load_comparison(written(tmp_path, tuned={}, controls=[], arms={}, **changes)))
        return sum(race.arm == "plain" for race in plan.races)

    assert plain() == 0
    assert plain(measure_every=30) == 2
    assert plain(run={"schedule": {"average": 20}}) == 2
    assert plain(run={"training": {"lr_scheduler": "linear"}}) == 2

"""``next-core backtest``."""

import pytest

from next_core.cli.backtest_command import parse_predictors
from tests.cli.conftest import assert_fails, facts
from tests.conftest import STEPS, Cli, LoraRun


@pytest.fixture
def backtest(cli: Cli, lora_run: LoraRun) -> Cli:
    """``backtest(*options)`` of a recorded LoRA run."""
    return lambda *more: cli("backtest", "--checkpoints", lora_run.path, *more)


def test_a_table_shows_the_best_first_and_marks_what_beats_no_jump(backtest: Cli) -> None:
    outcome = backtest("--predictors", "secant", "--horizon", 10, "--draws", 5)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("predictor")) + 1
    rows = [line.split() for line in lines[first : first + 4]]
    assert {row[0] for row in rows} == {"secant", "ridge", "stay", "random"}
    assert rows[0][:2] == ["secant", "*"]
    assert "↑" in rows[0]
    skills = [float(row[2] if row[1] == "*" else row[1]) for row in rows]
    assert skills == sorted(skills, reverse=True)
    assert "secant" in lines[-1]
    assert "…" not in outcome.out


def test_with_json_standard_output_is_one_object(backtest: Cli) -> None:
    outcome = backtest("--predictors", "secant,relex", "--horizon", 20, "--draws", 2, "--json", "--seed", 4)
    found = facts(outcome)
    assert (found["horizon"], found["cuts"], found["draws"], found["seed"]) == (20, list(STEPS[:-2]), 2, 4)
    assert (found["layout"], found["steps"]) == ("peft-adapter", list(STEPS))
    assert set(found["predictors"]) == {"stay", "random", "ridge", "secant", "relex"}
    stay, secant = found["predictors"]["stay"], found["predictors"]["secant"]
    assert (stay["skill"], stay["skill_low"], stay["null_skill"], stay["abstained"]) == (0, 0, 0, 1)
    assert secant["null_skill"] < secant["skill"] <= 1
    assert len(secant["per_matrix"]) == 14
    assert {"skill_high", "rel_error", "cosine", "norm_ratio", "lambda", "damped_skill", "seconds"} < secant.keys()
    assert secant["failures"] == []
    assert "secant" in outcome.err


def test_without_walks_there_is_no_null_and_one_cut_has_no_interval(backtest: Cli) -> None:
    found = facts(backtest("--predictors", "secant", "--draws", 0, "--cuts", 1, "--json"))
    assert found["cuts"] == [40]
    secant = found["predictors"]["secant"]
    assert (secant["null_skill"], secant["null_high"], secant["skill_low"]) == (None, None, None)
    assert not secant["above_null"]


def test_settings_go_to_the_predictor_they_name(backtest: Cli) -> None:
    merged = "--predictors", "secant", "--horizon", 10, "--draws", 0, "--json", "--set", "secant.space=merged"
    plain, found = facts(backtest(*merged)), facts(backtest(*merged, "--set", "secant.damping=0.5"))
    assert found["predictors"]["secant"]["fields"] == {"space": "merged", "damping": 0.5}
    half = found["predictors"]["secant"]["norm_ratio"] / plain["predictors"]["secant"]["norm_ratio"]
    assert half == pytest.approx(0.5)


def test_by_default_networks_are_left_out_with_a_note_unless_a_setting_names_them(backtest: Cli) -> None:
    others = {"stay", "random", "ridge", "secant", "rl-extra", "relex", "alpharl"}
    found = facts(backtest("--horizon", 10, "--draws", 0, "--json"))
    assert others <= set(found["predictors"])
    assert any("next-mlp, next-mlp-reduced" in note for note in found["notes"])
    assert not {"next-mlp", "next-mlp-reduced"} & set(found["predictors"])
    every = parse_predictors("all", ["next-mlp.epochs=7"])
    assert every["next-mlp"] == {"epochs": 7}
    assert {*others, "next-mlp-reduced"} <= set(every)
    named = parse_predictors(None, ["next-mlp-reduced.epochs=3"])
    assert named is not None
    assert ("next-mlp-reduced" in named, "next-mlp" in named) == (True, False)


@pytest.mark.parametrize(
    ("more", "code", "kind", "names"),
    [
        (("--set", "secant=5"), 2, "config-invalid-value", ("secant",)),
        (("--predictors", "secant", "--set", "window=10"), 2, "config-invalid-value", ("window",)),
        (("--predictors", "ridge", "--set", "secant.window=5"), 2, "config-contradiction", ("secant",)),
        (("--predictors", "ridge", "--set", "secant={}"), 2, "config-contradiction", ("secant",)),
        (("--predictors", "secant", "--set", "secant.windw=5"), 2, "config", ("windw", "window")),
        (("--predictors", " , "), 2, "config-invalid-value", ("--predictors",)),
        (("--predictors", "secnt"), 5, "plugin", ("secnt", "secant")),
    ],
)
def test_a_mistake_has_its_kind(
    backtest: Cli, more: tuple[str, ...], code: int, kind: str, names: tuple[str, ...]
) -> None:
    outcome = backtest("--json", *more)
    assert_fails(outcome, code, kind, *names)

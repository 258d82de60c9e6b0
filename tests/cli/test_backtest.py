"""`next-core backtest`, as the command that the console script calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from next_core.cli.backtest_command import parse_predictors
from next_core.errors import ConfigError
from tests.conftest import STEPS, LoraRun, Outcome


@pytest.fixture
def judged(cli: Callable[..., Outcome], lora_run: LoraRun) -> Callable[..., Outcome]:
    """``judged(*options)`` of a recorded LoRA run."""
    return lambda *more: cli("backtest", "--checkpoints", lora_run.path, *more)


def facts(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = json.loads(outcome.out.splitlines()[-1], parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def test_a_table_shows_the_best_first_and_says_what_beats_staying(judged: Callable[..., Outcome]) -> None:
    outcome = judged("--predictors", "secant", "--horizon", 10, "--draws", 5)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "peft-adapter (checkpoint-N): 6 checkpoints, steps 10 to 60; 14 matrices"
    assert lines[1].startswith("10 steps ahead of 5 cuts (steps 10 to 50, which do not overlap), 14 matrices, 5 random")
    heads = next(i for i, line in enumerate(lines) if line.startswith("predictor"))
    rows = [line.split() for line in lines[heads + 1 : heads + 5]]
    assert rows[0][0] == "secant"
    assert {row[0] for row in rows} == {"secant", "ridge", "stay", "random"}
    skills = [float(row[2] if row[1] == "*" else row[1]) for row in rows]
    assert skills == sorted(skills, reverse=True)
    assert rows[0][1] == "*"
    assert "↑" in rows[0]
    assert lines[-1].startswith("Better than staying and than its random walks: secant")
    assert "…" not in outcome.out


def test_with_json_the_last_line_is_one_strict_object(judged: Callable[..., Outcome]) -> None:
    outcome = judged("--predictors", "secant,relex", "--horizon", 20, "--draws", 2, "--json", "--seed", 4)
    found = facts(outcome)
    assert len(outcome.out.splitlines()) == 1
    assert (found["horizon"], found["cuts"], found["draws"], found["seed"]) == (20, list(STEPS[:-2]), 2, 4)
    assert (found["layout"], found["steps"]) == ("peft-adapter", list(STEPS))
    assert set(found["predictors"]) == {"stay", "random", "ridge", "secant", "relex"}
    stay, secant = found["predictors"]["stay"], found["predictors"]["secant"]
    assert (stay["skill"], stay["skill_low"], stay["null_skill"], stay["abstained"]) == (0, 0, 0, 1)
    assert secant["null_skill"] < secant["skill"] <= 1
    assert len(secant["per_matrix"]) == 14
    assert secant["failures"] == []
    assert "Skill against staying put" in outcome.err


def test_without_walks_there_is_no_null_and_few_cuts_have_no_interval(judged: Callable[..., Outcome]) -> None:
    found = facts(judged("--predictors", "secant", "--draws", 0, "--cuts", 1, "--json"))
    assert found["cuts"] == [40]
    secant = found["predictors"]["secant"]
    assert (secant["null_skill"], secant["null_high"], secant["skill_low"]) == (None, None, None)
    assert not secant["above_null"]
    assert "0 random walks" in judged("--predictors", "secant", "--draws", 0).out


def test_fields_go_to_the_predictor_they_name(judged: Callable[..., Outcome]) -> None:
    merged = "--predictors", "secant", "--horizon", 10, "--draws", 0, "--json", "--set", "secant.space=merged"
    plain, found = facts(judged(*merged)), facts(judged(*merged, "--set", "secant.damping=0.5"))
    assert found["predictors"]["secant"]["fields"] == {"space": "merged", "damping": 0.5}
    half = found["predictors"]["secant"]["norm_ratio"] / plain["predictors"]["secant"]["norm_ratio"]
    assert half == pytest.approx(0.5)


def test_by_default_networks_are_left_out_unless_a_field_names_them() -> None:
    assert parse_predictors(None, []) is None
    every = parse_predictors("all", ["next-mlp.epochs=7"])
    assert every is not None
    assert every["next-mlp"] == {"epochs": 7}
    assert {"stay", "random", "ridge", "secant", "rl-extra", "relex", "alpharl", "next-mlp-reduced"} <= set(every)
    named = parse_predictors(None, ["next-mlp-reduced.epochs=3"])
    assert named is not None
    assert "next-mlp-reduced" in named
    assert "next-mlp" not in named


def test_what_was_left_out_is_said(judged: Callable[..., Outcome]) -> None:
    found = facts(judged("--horizon", 10, "--draws", 0, "--json"))
    assert any("not judged, as they train at every cut: next-mlp, next-mlp-reduced" in note for note in found["notes"])
    assert {"stay", "random", "ridge", "secant", "rl-extra", "relex", "alpharl"} <= set(found["predictors"])
    assert not {"next-mlp", "next-mlp-reduced"} & set(found["predictors"])


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--set", "secant=5"), 2, "name the predictor"),
        (("--predictors", "ridge", "--set", "secant.window=5"), 2, "'secant' is not judged"),
        (("--predictors", "secant", "--set", "secant.windw=5"), 2, "did you mean 'window'"),
        (("--predictors", "secnt"), 5, "Did you mean 'secant'"),
        (("--horizon", "15"), 2, "no two checkpoints lie 15 steps apart"),
        (("--draws", "1"), 2, "draws must be 0 (no null) or at least 2"),
    ],
)
def test_what_cannot_be_has_its_exit_code(
    judged: Callable[..., Outcome], more: tuple[str, ...], code: int, message: str
) -> None:
    outcome = judged(*more)
    assert outcome.code == code
    assert message in outcome.err


def test_a_value_where_a_predictor_is_wanted_is_refused() -> None:
    with pytest.raises(ConfigError, match="as in secant.window=10"):
        parse_predictors("secant", ["window=10"])

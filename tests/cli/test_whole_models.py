"""Checkpoints of whole models on the command line: the applier follows from them, and few questions need a backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import Secant, backtest, open_run
from tests.conftest import Cli
from tests.sources.models import SMALL, StraightRun, built, straight_run

NEED_NONE = ("random", "secant")
NEED_A_BACKBONE = ("next-mlp-reduced", "relex", "ridge", "rl-extra")


def model(**others: Any) -> Any:
    return built("Qwen2ForCausalLM", "Qwen2Config", **SMALL, num_key_value_heads=1, **others)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> StraightRun:
    return straight_run(tmp_path_factory.mktemp("whole"), model(), steps=(5, 10, 15, 20))


def test_backtest_scores_what_needs_no_backbone_and_names_the_rest(run: StraightRun, cli: Cli) -> None:
    options = ("--predictors", "secant", "--set", "secant.window=5", "--draws", 2, "--json")
    found = cli("backtest", "--checkpoints", run.path, *options)
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["cuts"] == [10]  # step 5 is where the known motion begins; 15 and 20 have no checkpoint 10 steps on
    assert any("step 5" in note for note in told["notes"])
    judged = told["predictors"]
    assert judged["secant"]["skill"] == pytest.approx(1)  # every weight moves along a straight line
    assert "--backbone" in str(judged["random"]["failures"])  # it takes the size of a motion since step 0
    assert judged["secant"]["failures"] == []


def test_so_does_a_notebook(run: StraightRun) -> None:
    found = backtest(open_run(run.path), [Secant(window=5)], horizon=5, draws=0)
    assert found.cuts == (10, 15)
    assert found.predictors["secant"].score.skill == pytest.approx(1)


def test_plan_names_the_applier_that_follows_from_the_run(run: StraightRun, cli: Cli) -> None:
    told = json.loads(cli("plan", "--checkpoints", run.path, "--horizon", 5, "--json").out)
    assert told["write"]["applier"] == "merged-model"
    assert told["write"]["bytes"] == (run.path / "checkpoint-20" / "model.safetensors").stat().st_size


def test_extrapolate_writes_a_model_like_the_newest(run: StraightRun, tmp_path: Path, cli: Cli) -> None:
    found = cli("extrapolate", "--checkpoints", run.path, "--horizon", 10, "--out", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["applier"] == "merged-model"
    assert run.differing(tmp_path / "out", model(), step=30) == []
    assert not (tmp_path / "out" / "trainer_state.json").exists()


@pytest.mark.parametrize("predictor", [*NEED_NONE, *NEED_A_BACKBONE])
def test_only_some_predictors_need_a_backbone(run: StraightRun, predictor: str, tmp_path: Path, cli: Cli) -> None:
    command = ["extrapolate", "--checkpoints", run.path, "--horizon", 5, "--predictor", predictor]
    found = cli(*command, "--out", tmp_path / "out")
    assert ("config-missing-backbone" in found.err) == (predictor in NEED_A_BACKBONE), found.err
    assert (found.code == 0) == (predictor in NEED_NONE)
    assert cli(*command, "--backbone", run.base, "--out", tmp_path / "more").code == 0


def test_checkpoints_without_a_config_need_a_backbone(tmp_path: Path, cli: Cli) -> None:
    run = straight_run(tmp_path, model())
    (run.path / "checkpoint-20" / "config.json").unlink()
    command = ("extrapolate", "--checkpoints", run.path, "--horizon", 10)
    assert "config-missing-backbone" in cli(*command, "--out", tmp_path / "out").err
    assert cli(*command, "--backbone", run.base, "--out", tmp_path / "out").code == 0


def test_a_resized_vocabulary_needs_no_backbone(tmp_path: Path, cli: Cli) -> None:
    resized = model()
    resized.resize_token_embeddings(35)
    run = straight_run(tmp_path, resized)
    model().save_pretrained(run.base)
    command = ("extrapolate", "--checkpoints", run.path, "--horizon", 10, "--out", tmp_path / "out")
    assert "checkpoint-other-vocabulary" in cli(*command, "--backbone", run.base).err
    assert cli(*command).code == 0
    assert run.differing(tmp_path / "out", resized, step=30) == []


def test_matrices_that_the_checkpoints_do_not_store_are_named(tmp_path: Path, cli: Cli) -> None:
    run, name = straight_run(tmp_path, model()), "model.layers.0.mlp.up_proj.weight"
    for step in (10, 20):
        file = run.path / f"checkpoint-{step}" / "model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if key != name}, file, {"format": "pt"})
    command = ("extrapolate", "--checkpoints", run.path, "--backbone", run.base, "--horizon", 10)
    found = cli(*command, "--out", tmp_path / "out")
    assert f"(1): {name}" in found.out
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[name], run.began[name])
    assert name in (tmp_path / "out" / "README.md").read_text()

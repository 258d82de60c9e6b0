"""The options that commands on recorded checkpoints share, and `next-core plan`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_cli import facts
from tests.conftest import STEPS, LoraRun, Outcome

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def extrapolate(cli: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path) -> Callable[..., Outcome]:
    def run(*more: object, checkpoints: Path = lora_run.path, out: Path = tmp_path / "out") -> Outcome:
        return cli("extrapolate", "--checkpoints", checkpoints, "--out", out, "--horizon", 10, "--json", *more)

    return run


def test_several_alphas_make_several_adapters(extrapolate: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = extrapolate("--alphas", "0.5,1,2", "--set", "space=merged")
    assert outcome.code == 0, outcome.err
    assert facts(outcome)["alpha"] == [0.5, 1.0, 2.0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "alpha-0.5",
        "alpha-1",
        "alpha-2",
    ]
    assert extrapolate("--set", "space=merged", "--alpha", 2, out=tmp_path / "alone").code == 0
    alone, swept = (load_file(tmp_path / folder / WEIGHTS) for folder in ("alone", "out/alpha-2"))
    for key, value in alone.items():
        torch.testing.assert_close(swept[key], value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alphas", "0.5,two"), "takes numbers with commas between them"),
        (("--alphas", "0.5,0.5"), "give each once"),
        (("--alphas", "0.5,-1"), "must be numbers above 0"),
        (("--alphas", "0.5", "--alpha", "2"), "contradict"),
        (("--cache", "kept", "--no-cache"), "contradict"),
        (("--workers", "0"), "workers"),
        (("--executor", "dask"), "'local' or 'ray'"),
    ],
)
def test_what_contradicts_is_said_before_anything_is_computed(
    more: tuple[str, ...], message: str, extrapolate: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = extrapolate(*more)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_second_predictor_finds_what_the_first_one_had_decomposed(
    extrapolate: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    assert extrapolate("--predictor", "alpharl", "--cache", kept).code == 0
    first = load_file(tmp_path / "out" / WEIGHTS)
    assert len(list(kept.rglob("*.safetensors"))) == len(STEPS) + 1  # and the recent motion
    monkeypatch.setattr("next_core.history.matrix_tasks.Compress.__call__", None)
    again = extrapolate("--predictor", "alpharl", "--cache", kept, out=tmp_path / "again")
    assert again.code == 0, again.err
    for key, value in load_file(tmp_path / "again" / WEIGHTS).items():
        assert torch.equal(value, first[key])
    with pytest.raises(TypeError):  # without the cache it would have to be computed
        extrapolate("--predictor", "alpharl", "--no-cache", out=tmp_path / "anew")


def test_a_pool_of_processes_writes_the_same_bytes(extrapolate: Callable[..., Outcome], tmp_path: Path) -> None:
    assert extrapolate("--predictor", "alpharl", "--no-cache").code == 0
    outcome = extrapolate("--predictor", "alpharl", "--no-cache", "--workers", 2, out=tmp_path / "pool")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "pool" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_without_ray_the_extra_is_named(extrapolate: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = extrapolate("--predictor", "alpharl", "--executor", "ray")
    assert outcome.code == 2
    assert "pip install next-core[ray]" in outcome.err


def test_checkpoints_can_be_listed_one_by_one(cli: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path) -> None:
    listed = [word for step in (40, 50, 60) for word in ("--checkpoints", lora_run.folder(step))]
    outcome = cli("extrapolate", *listed, "--out", tmp_path / "out", "--horizon", 10, "--json")
    assert outcome.code == 0, outcome.err
    assert facts(outcome)["steps"] == [40, 50, 60]
    assert facts(outcome)["naming"] == "checkpoint-N"


def test_damaged_checkpoints_end_it_or_are_left_out_by_name(
    extrapolate: Callable[..., Outcome], own_lora_run: LoraRun, tmp_path: Path
) -> None:
    file = own_lora_run.folder(30) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    refused = extrapolate(checkpoints=own_lora_run.path)
    assert refused.code == 3
    assert str(file) in refused.err
    assert not (tmp_path / "out").exists()
    outcome = extrapolate("--skip-damaged", checkpoints=own_lora_run.path)
    assert outcome.code == 0, outcome.err
    assert facts(outcome)["steps"] == [10, 20, 40, 50, 60]
    assert any("checkpoint-30" in note for note in facts(outcome)["notes"])


def test_what_is_left_of_a_jump_after_rounding_is_said(extrapolate: Callable[..., Outcome], lora_run: LoraRun) -> None:
    outcome = extrapolate("--applier", "merged-model", "--backbone", lora_run.base)
    assert outcome.code == 0, outcome.err
    assert facts(outcome)["share_landed"]["1"] == pytest.approx(1.0, abs=1e-3)
    assert "of the jump is left after rounding" in outcome.err


def test_a_plan_of_checkpoints_writes_nothing(cli: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path) -> None:
    arguments = ("--checkpoints", lora_run.path, "--horizon", 20, "--predictor", "next-mlp", "--out", tmp_path / "out")
    outcome = cli("plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    plan = facts(outcome)
    assert plan["read"]["steps"] == list(STEPS)
    assert plan["compute"]["predictor"] == "next-mlp"
    assert plan["write"]["bytes"] > 0
    assert plan["time"]["compress"] > 0
    assert not (tmp_path / "out").exists()
    assert "bytes a checkpoint" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "plan a run (next-core plan CONFIG) or an extrapolation"),
        (("--checkpoints", "RUN"), 2, "--checkpoints needs --horizon"),
        (("run.yaml", "--checkpoints", "RUN"), 2, "plan a run (next-core plan CONFIG) or an extrapolation"),
        (("--checkpoints", "RUN", "--horizon", 0), 2, "horizon must be at least 1"),
        (("--checkpoints", "RUN", "--horizon", 10, "--predictor", "secnat"), 5, "secant"),
        (("--checkpoints", "RUN", "--horizon", 10, "--applier", "merged-model"), 2, "pass --backbone FOLDER"),
        (("--checkpoints", "nowhere", "--horizon", 10), 3, "nowhere is not a folder"),
        (("none.yaml",), 2, "none.yaml cannot be read"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(
    arguments: tuple[object, ...], code: int, message: str, cli: Callable[..., Outcome], lora_run: LoraRun
) -> None:
    outcome = cli("plan", *(lora_run.path if word == "RUN" else word for word in arguments))
    assert outcome.code == code
    assert message in outcome.err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_cannot_be_written_is_said_before_anything_is_decomposed(
    extrapolate: Callable[..., Outcome],
    lora_run: LoraRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr("next_core.cli.options.Run.history", None)
    for step in (10, 20):
        shutil.copytree(lora_run.base, tmp_path / "full" / f"checkpoint-{step}")
    merged = ("--applier", "merged-model", "--no-cache")
    with_base = (*merged, "--backbone", lora_run.base)
    in_place = ("--set-applier", "in_place=true")
    for arguments, folders, message in (
        (("--applier", "peft-adapter"), {"checkpoints": tmp_path / "full"}, "needs a run of LoRA adapters"),
        (merged, {}, "pass --backbone FOLDER"),
        (with_base, {"out": lora_run.base / "new"}, "which is being read"),
        (("--no-cache",), {"out": lora_run.path / "new"}, "which is being read"),
        ((*with_base, *in_place), {"out": tmp_path / "none"}, "does not exist"),
    ):
        outcome = extrapolate(*arguments, *more, **folders)
        assert outcome.code == 2, outcome.err
        assert message in outcome.err

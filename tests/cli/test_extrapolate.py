"""``next-core extrapolate``, and the options that every command on recorded checkpoints has."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from next_core.plugins import trajectory_predictors
from tests.cli.conftest import assert_fails, facts
from tests.conftest import STEPS, Cli, LoraRun

WEIGHTS = "adapter_model.safetensors"
FROZEN = "model.layers.1.self_attn.k_proj.weight"
QUICK = {"next-mlp": ("--set", "epochs=60", "--set", "lr=1e-3"), "next-mlp-reduced": ("--set", "epochs=5")}
PREDICTORS = [name for name in trajectory_predictors()[0] if name not in ("stay", "effopd")]  # effopd: at powers of two


@pytest.fixture(scope="module")
def trained(lora_run: LoraRun) -> dict[str, torch.Tensor]:
    return load_file(lora_run.folder(60) / WEIGHTS)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_predictor_writes_an_adapter(
    predictor: str, extrapolate: Cli, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = facts(extrapolate("--json", *QUICK.get(predictor, ()), predictor=predictor))
    assert found["predictor"] == predictor
    assert (found["layout"], found["steps"], found["horizon"]) == ("peft-adapter", list(STEPS), 10)
    assert (found["moved"], list(found["abstained"])) == (13, [FROZEN])
    assert found["norm"] > 0
    jumped = load_file(tmp_path / "out" / WEIGHTS)
    assert jumped.keys() == trained.keys()
    assert all(value.isfinite().all() for value in jumped.values())
    assert any(not torch.equal(value, trained[key]) for key, value in jumped.items())


def test_settings_reach_the_predictor_and_the_applier(extrapolate: Cli, tmp_path: Path) -> None:
    settings = ("--set", "space=merged", "--set", "window=20", "--set-applier", "rank=2")
    assert extrapolate(*settings, alpha=2, rank=3).code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})
    assert {min(tensor.shape) for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {2}


def test_a_merged_model_reports_what_rounding_leaves(extrapolate: Cli, lora_run: LoraRun, tmp_path: Path) -> None:
    found = facts(extrapolate("--json", applier="merged-model", backbone=lora_run.base))
    assert (found["applier"], found["out"]) == ("merged-model", str(tmp_path / "out"))
    assert found["share_landed"]["1"] == pytest.approx(1.0, abs=1e-3)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_dry_run_writes_nothing(extrapolate: Cli, tmp_path: Path) -> None:
    found = facts(extrapolate("--dry-run", "--json", out=tmp_path / "deep" / "out"))
    assert found["out"] is None
    assert found["norm_ratio"] > 0
    assert list(tmp_path.iterdir()) == []


def test_text_output_names_what_moved_and_the_folder(extrapolate: Cli, tmp_path: Path) -> None:
    out = tmp_path / "[bold]a[" / "b]"
    shown = extrapolate(out=out).out
    for words in ("peft-adapter (checkpoint-N): 6 checkpoints, steps 10 to 60", "13 of 14 matrices", FROZEN, str(out)):
        assert words in shown
    closing = tmp_path / "[" / "red]"
    assert_fails(extrapolate(checkpoints=closing), 3, "checkpoint", closing)


def test_several_alphas_write_several_adapters(extrapolate: Cli, tmp_path: Path) -> None:
    merged = ("--set", "space=merged")
    assert facts(extrapolate("--alphas", "0.5,1,2", *merged, "--json"))["alpha"] == [0.5, 1.0, 2.0]
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["alpha-0.5", "alpha-1", "alpha-2"]
    assert extrapolate(*merged, "--alpha", 2, out=tmp_path / "alone").code == 0
    alone, swept = (load_file(tmp_path / folder / WEIGHTS) for folder in ("alone", "out/alpha-2"))
    for key, value in alone.items():
        torch.testing.assert_close(swept[key], value)


@pytest.mark.parametrize(
    ("more", "code", "kind", "names"),
    [
        (("--alpha", "0"), 2, "config-invalid-value", ("--alpha", "0")),
        (("--alpha", "nan"), 2, "config-invalid-value", ("--alpha", "nan")),
        (("--alpha", "inf"), 2, "config-invalid-value", ("--alpha", "inf")),
        (("--alphas", "0.5,two"), 2, "config-invalid-value", ("--alphas", "two")),
        (("--alphas", "0.5,-1"), 2, "config", ("-1",)),
        (("--alphas", "0.5,0.5"), 2, "config", ("alpha-0.5",)),
        (("--alphas", "0.5", "--alpha", "2"), 2, "config-contradiction", ("--alpha", "--alphas")),
        (("--rank", "0"), 2, "config", ("rank", "0")),
        (("--workers", "0"), 2, "config-invalid-value", ("workers",)),
        (("--executor", "dask"), 2, "config-invalid-value", ("local", "ray")),
        (("--cache", "kept", "--no-cache"), 2, "config-contradiction", ("--cache", "--no-cache")),
        (("--set", "windw=3"), 2, "config", ("secant", "windw", "window")),
        (("--set", "window"), 2, "config", ("window",)),
        (("--set", "window=0"), 2, "config", ("window", "0")),
        (("--set-applier", "rnk=3"), 2, "config", ("peft-adapter", "rnk", "rank")),
        (("--applier", "in-memory"), 2, "config-invalid-value", ("in-memory", "merged-model")),
        (("--applier", "merged-model"), 2, "config", ("--backbone",)),
        (("--layout", "memory"), 2, "config", ("memory",)),
        (("--backbone", "nowhere"), 3, "checkpoint", ("nowhere",)),
        (("--layout", "full-model"), 3, "checkpoint", ("model.safetensors",)),
        (("--set", "window=7"), 3, "predictor-abstained", ("secant", "step 60")),
        (("--predictor", "stay"), 3, "predictor-abstained", ("stay",)),
        (("--strict",), 4, "predictor-abstained", (FROZEN,)),
        (("--predictor", "secnat"), 5, "plugin", ("secnat", "secant")),
        (("--applier", "peft-adaptor"), 5, "plugin", ("peft-adaptor", "peft-adapter")),
        (("--layout", "nothing"), 5, "plugin", ("nothing",)),
    ],
)
def test_a_mistake_has_its_kind_and_writes_nothing(
    extrapolate: Cli, tmp_path: Path, more: tuple[str, ...], code: int, kind: str, names: tuple[str, ...]
) -> None:
    assert_fails(extrapolate("--json", *more), code, kind, *names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_cannot_be_written_fails_before_anything_is_decomposed(
    extrapolate: Cli, lora_run: LoraRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr("next_core.cli.options.RunOptions.history", None)
    for step in (10, 20):
        shutil.copytree(lora_run.base, tmp_path / "full" / f"checkpoint-{step}")
    merged = ("--applier", "merged-model", "--backbone", lora_run.base)
    for arguments, folders, name in (
        (("--applier", "peft-adapter"), {"checkpoints": tmp_path / "full"}, "merged-model"),
        (merged, {"out": lora_run.base / "new"}, lora_run.base),
        ((), {"out": lora_run.path / "new"}, lora_run.path),
        *([] if more else [((), {"out": tmp_path / "full"}, tmp_path / "full")]),
    ):
        outcome = extrapolate("--json", *arguments, *more, **folders)
        assert outcome.code == 2, outcome.err
        assert str(name) in outcome.err


def test_a_second_predictor_reads_the_cache(extrapolate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    assert extrapolate("--predictor", "alpharl", "--cache", kept).code == 0
    first = load_file(tmp_path / "out" / WEIGHTS)
    assert len(list(kept.rglob("*.safetensors"))) == len(STEPS) + 1  # and the update of the last steps
    monkeypatch.setattr("next_core.history.matrix_tasks.Compress.__call__", None)
    again = extrapolate("--predictor", "alpharl", "--cache", kept, out=tmp_path / "again")
    assert again.code == 0, again.err
    for key, value in load_file(tmp_path / "again" / WEIGHTS).items():
        assert torch.equal(value, first[key])
    with pytest.raises(TypeError):  # without the cache it has to be computed
        extrapolate("--predictor", "alpharl", "--no-cache", out=tmp_path / "anew")


def test_checkpoints_can_be_listed_one_by_one(cli: Cli, lora_run: LoraRun, tmp_path: Path) -> None:
    listed = [word for step in (40, 50, 60) for word in ("--checkpoints", lora_run.folder(step))]
    found = facts(cli("extrapolate", *listed, "--out", tmp_path / "out", "--horizon", 10, "--json"))
    assert (found["steps"], found["naming"]) == ([40, 50, 60], "checkpoint-N")


MODULE = """
from next_predictors.secant import Secant

class Mine(Secant):
    name = "mine"
"""


def test_a_predictor_can_be_a_local_class(extrapolate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_predictors.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert facts(extrapolate("--json", predictor="own_predictors:Mine"))["moved"] == 13

"""The command line: one line for a mistake, an exit code for its kind, one JSON object for machines."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import cli as cli_module
from next_core.backend import Backend
from next_core.errors import BackendError, CheckpointError, ConfigError, GuardError, PluginError
from next_core.plugins import Registry, registry
from tests.conftest import STEPS, LoraRun, Outcome

NEXT_CORE = Path(sys.executable).with_name("next-core")
FAST = {"next-mlp": ["--set", "epochs=60", "--set", "lr=1e-3"]}
PREDICTORS = [name for name in registry().names("predictor") if name != "stay"]


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed script, as a user calls it, on a terminal of no size."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(NEXT_CORE), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def facts(outcome: Outcome) -> dict[str, Any]:
    """The last line of standard output, as strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = json.loads(outcome.out.splitlines()[-1], parse_constant=refuse)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def extrapolate(cli: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path) -> Callable[..., Outcome]:
    """``extrapolate(checkpoints=..., out=..., horizon=10, predictor=..., ...)`` with sensible defaults."""

    def run(*more: object, **options: object) -> Outcome:
        given = {"checkpoints": lora_run.path, "out": tmp_path / "out", "horizon": 10} | options
        return cli("extrapolate", *(x for key, value in given.items() for x in (f"--{key}", value)), *more)

    return run


def test_help_answers_at_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['next-core', '--help']\nfrom next_core.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pydantic', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_names_the_commands_and_the_exit_codes(tmp_path: Path) -> None:
    done = call("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("run", "extrapolate", "plugins", "schema", "Exit codes"):
        assert word in done.stdout
    assert call("extrapolate", "--help", cwd=tmp_path).returncode == 0


def test_the_installed_script_extrapolates_and_its_last_line_is_json(lora_run: LoraRun, tmp_path: Path) -> None:
    arguments = ("--checkpoints", lora_run.path, "--out", "jumped", "--horizon", 10, "--backbone", lora_run.base)
    done = call("extrapolate", *arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert facts(Outcome(0, done.stdout, ""))["out"] == "jumped"
    assert len(done.stdout.splitlines()) == 1
    assert (tmp_path / "jumped" / "adapter_model.safetensors").exists()


def test_the_installed_script_says_what_is_wrong_in_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = call("extrapolate", "--checkpoints", "nowhere", "--out", "out", "--horizon", 10, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == (
        "CheckpointError: nowhere is not a folder; pass the folder that holds checkpoint-N or step-N\n"
    )


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_extrapolates_a_run_into_an_adapter_that_peft_loads(
    predictor: str, extrapolate: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path, logits: Callable[[Any], Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    outcome = extrapolate("--json", *FAST.get(predictor, []), predictor=predictor)
    assert outcome.code == 0, outcome.err
    found = facts(outcome)
    assert found["predictor"] == predictor
    assert (found["layout"], found["steps"], found["horizon"]) == ("peft-adapter", list(STEPS), 10)
    assert found["moved"] == 13
    assert set(found["abstained"]) == {"model.layers.1.self_attn.k_proj.weight"}
    assert found["norm"] > 0
    base = AutoModelForCausalLM.from_pretrained(lora_run.base)
    jumped = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(lora_run.base)
    trained = logits(PeftModel.from_pretrained(base, lora_run.folder(60)))
    assert torch.isfinite(jumped).all()
    assert (jumped - trained).abs().max() > 1e-4


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_fewer_checkpoints_than_a_predictor_needs_are_a_checkpoint_error_and_nothing_is_written(
    predictor: str, extrapolate: Callable[..., Outcome], own_lora_run: LoraRun, tmp_path: Path
) -> None:
    for step in (0, *STEPS[1:]):
        shutil.rmtree(own_lora_run.folder(step))
    out = tmp_path / "elsewhere" / "out"
    outcome = extrapolate(*FAST.get(predictor, []), checkpoints=own_lora_run.path, out=out, predictor=predictor)
    if outcome.code == 0:  # from the backbone to the one checkpoint there is a line
        assert predictor in ("secant", "rl-extra", "random")
        return
    assert outcome.code == 3, outcome.err
    assert outcome.err.startswith(f"CheckpointError: {predictor} predicts nothing from ")
    assert not out.parent.exists()


def test_the_control_predicts_nothing_and_says_so(extrapolate: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = extrapolate(predictor="stay")
    assert outcome.code == 3
    assert "the control makes no jump" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_settings_reach_the_predictor_and_the_applier(extrapolate: Callable[..., Outcome], tmp_path: Path) -> None:
    more = ("--set", "space=merged", "--set", "window=20", "--set-applier", "rank=2", "--json")
    assert extrapolate(*more, alpha=2, rank=3).code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}


def test_a_merged_model_is_written_with_the_base_model_at_hand(
    extrapolate: Callable[..., Outcome], lora_run: LoraRun, tmp_path: Path
) -> None:
    outcome = extrapolate(applier="merged-model", backbone=lora_run.base)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert f"written: {tmp_path / 'out'} (merged-model)\n" in outcome.out


def test_a_dry_run_reports_and_writes_nothing(extrapolate: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = extrapolate("--dry-run", "--json", out=tmp_path / "deep" / "out")
    assert outcome.code == 0
    assert facts(outcome)["out"] is None
    assert facts(outcome)["norm_ratio"] > 0
    assert "nothing written (--dry-run)" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_people_are_told_what_moved_and_what_did_not(extrapolate: Callable[..., Outcome]) -> None:
    outcome = extrapolate()
    assert "peft-adapter (checkpoint-N): 6 checkpoints, steps 10 to 60; 14 matrices" in outcome.out
    assert "secant moved 13 matrices by 10 steps" in outcome.out
    assert "stays: model.layers.1.self_attn.k_proj.weight: did not move since step 50" in outcome.out


def test_names_that_look_like_markup_are_printed_as_they_are(
    extrapolate: Callable[..., Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "[bold]a[" / "b]"
    outcome = extrapolate(out=out)
    assert outcome.code == 0
    assert f"written: {out} (peft-adapter)" in outcome.out
    closing = tmp_path / "[" / "red]"
    assert extrapolate(checkpoints=closing).err == (
        f"CheckpointError: {closing} is not a folder; pass the folder that holds checkpoint-N or step-N\n"
    )


@pytest.mark.parametrize(
    ("options", "more", "code", "message"),
    [
        ({"alpha": 0}, [], 2, "ConfigError: --alpha must be a number above 0 (got 0)"),
        ({"alpha": -1}, [], 2, "ConfigError: --alpha must be a number above 0 (got -1)"),
        ({"alpha": "nan"}, [], 2, "ConfigError: --alpha must be a number above 0 (got nan)"),
        ({"alpha": "inf"}, [], 2, "ConfigError: --alpha must be a number above 0 (got inf)"),
        ({"horizon": 0}, [], 2, "ConfigError: --horizon must be at least 1 (got 0)"),
        ({"horizon": "soon"}, [], 2, "Invalid value for '--horizon'"),
        ({"rank": 0}, [], 2, "ConfigError: rank must be at least 1 (got 0)"),
        ({}, ["--set", "windw=3"], 2, "predictor 'secant'.windw: unknown key; did you mean 'window'?"),
        ({}, ["--set", "window"], 2, "'window' is not of the form key=value"),
        ({}, ["--set", "window=0"], 2, "greater than or equal to 1 (got 0)"),
        ({}, ["--set", "name=x"], 2, "predictor 'secant'.name: unknown key"),
        ({}, ["--set-applier", "rnk=3"], 2, "applier 'peft-adapter'.rnk: unknown key; did you mean 'rank'?"),
        ({"applier": "in-memory"}, [], 2, "the applier 'live' changes a model in memory"),
        ({"applier": "merged-model"}, [], 2, "needs the base model; pass --backbone FOLDER"),
        ({"layout": "memory"}, [], 2, "the source 'memory' does not read folders"),
        ({"backbone": "nowhere"}, [], 3, "CheckpointError: the model folder nowhere does not exist"),
        ({"layout": "full-model"}, [], 3, "holds neither model.safetensors nor"),
        ({}, ["--set", "window=7"], 3, "no checkpoint 7 steps before step 60"),
        ({}, ["--strict"], 4, "GuardError: 1 matrices abstain, among them 'model.layers.1.self_attn.k_proj.weight'"),
        ({"predictor": "secnat"}, [], 5, "PluginError: unknown predictor 'secnat'. Did you mean 'secant'?"),
        (
            {"applier": "peft-adaptor"},
            [],
            5,
            "PluginError: unknown applier 'peft-adaptor'. Did you mean 'peft-adapter'?",
        ),
        ({"layout": "nothing"}, [], 5, "PluginError: unknown source 'nothing'"),
    ],
)
def test_a_mistake_has_the_exit_code_of_its_kind_and_one_line_and_writes_nothing(
    extrapolate: Callable[..., Outcome],
    tmp_path: Path,
    options: dict[str, Any],
    more: list[str],
    code: int,
    message: str,
) -> None:
    outcome = extrapolate("--json", *more, **options)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_anything_is_computed(
    extrapolate: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    outcome = extrapolate(checkpoints=tmp_path / "nowhere")
    assert outcome.code == 2
    assert "exists already; choose another folder or remove it" in outcome.err


def test_a_damaged_checkpoint_is_named_with_exit_code_3(
    extrapolate: Callable[..., Outcome], own_lora_run: LoraRun, tmp_path: Path
) -> None:
    weights = own_lora_run.folder(60) / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, weights)
    outcome = extrapolate(checkpoints=own_lora_run.path, out=tmp_path / "out")
    assert outcome.code == 3
    assert "checkpoint-60/adapter_model.safetensors: '" in outcome.err
    assert "holds NaN or Inf" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(extrapolate: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = extrapolate(out=tmp_path / "file" / "out")
    assert outcome.code == 7
    assert str(tmp_path / "file") in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (CheckpointError("x"), 3),
        (GuardError("x"), 4),
        (PluginError("x"), 5),
        (BackendError("x"), 6),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 0),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    from next_core.cli import plugins_command as command

    def fail(as_json: bool) -> None:
        raise error

    monkeypatch.setattr(command, "plugins_command", fail)
    assert cli("plugins").code == code


def test_what_is_no_known_error_is_not_hidden(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    from next_core.cli import plugins_command as command

    def fail(as_json: bool) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command, "plugins_command", fail)
    with pytest.raises(ZeroDivisionError):
        cli("plugins")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text("")
    file = tmp_path / "run.yaml"
    file.write_text(
        "steps: 100\ntraining: {model: base, data: {train: train.jsonl}}\npredictor: secant\n"
        "schedule: {observe: 50, every: 5}\n"
    )
    return file


def test_a_dry_run_of_a_config_prints_the_plan_and_trains_nothing(
    cli: Callable[..., Outcome], config: Path, tmp_path: Path
) -> None:
    outcome = cli("run", config, "--out", tmp_path / "run", "--dry-run", "--json")
    assert outcome.code == 0
    assert facts(outcome)["compute"]["jumps after"] == [50]
    assert "the sizes of the model are not known" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("steps: 100\nsteps: 50\n", 2, "the key 'steps' is there twice"),
        ("steps: 100\ntraining: {model: base, data: {train: train.jsonl}}\npredictor: {name: secnat}\n", 5, "secnat"),
        ("steps: 100\ntraining: {model: nowhere, data: {train: train.jsonl}}\n", 2, "nowhere does not exist"),
    ],
)
def test_a_wrong_config_ends_a_run_before_it_begins(
    cli: Callable[..., Outcome], config: Path, tmp_path: Path, text: str, code: int, message: str
) -> None:
    config.write_text(text)
    outcome = cli("run", config, "--out", tmp_path / "run")
    assert outcome.code == code
    assert message in outcome.err
    assert not (tmp_path / "run").exists()
    assert cli("run", tmp_path / "none.yaml").code == 2


def test_a_backend_that_cannot_do_what_is_asked_is_exit_code_6(
    cli: Callable[..., Outcome], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: Any, run: Any, out: Path, resume: bool = False) -> int:
        raise BackendError("this trainer has no such algorithm")

    methods = dict.fromkeys(Backend.__abstractmethods__, lambda self, *_: None) | {
        "prepare": prepare,
        "name": "failing",
    }
    fresh = Registry()
    fresh.load_entry_points()
    fresh.add(type("Failing", (Backend,), methods))
    for module in ("next_core.plugins", "next_core.config"):
        monkeypatch.setattr(f"{module}.registry", lambda: fresh)
    config.write_text(config.read_text() + "backend: failing\n")
    outcome = cli("run", config, "--out", tmp_path / "run")
    assert outcome.code == 6
    assert outcome.err.endswith("BackendError: this trainer has no such algorithm\n")


def test_the_schema_is_printed_as_json(cli: Callable[..., Outcome]) -> None:
    outcome = cli("schema")
    assert outcome.code == 0
    assert {"steps", "predictor", "schedule"} <= set(json.loads(outcome.out)["properties"])


def test_the_version_is_the_installed_ones(cli: Callable[..., Outcome]) -> None:
    from importlib.metadata import version

    assert cli("--version").out == f"next-core {version('next-core')}\n"


def test_without_a_command_the_help_is_shown_and_an_unknown_one_is_a_mistake(cli: Callable[..., Outcome]) -> None:
    assert "extrapolate" in cli().out
    outcome = cli("extrapolat")
    assert outcome.code == 2
    assert "No such command 'extrapolat'" in outcome.err


def test_the_entry_point_is_the_one_that_is_installed() -> None:
    from importlib.metadata import entry_points

    [script] = entry_points(group="console_scripts", name="next-core")
    assert script.load() is cli_module.main

"""Adapter checkpoints as PEFT and TRL write them: read exactly, and refused by name when they are damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.sources.adapter_source import PeftAdapterSource, PeftAdapterSourceConfig
from next_core.storage.atomic import new_directory
from next_core.storage.json_lines import json_line
from tests.conftest import STEPS, LoraRun, MakeRun
from tests.errors import raises_kind
from tests.sources.models import edit_json

ROW = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{ROW}.lora_{{}}.weight"
WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"


def assert_deltas_are_pefts(source: CheckpointSource, run: LoraRun) -> None:
    assert {parameter.name for parameter in source.parameters} == set(run.deltas[source.steps[0]])
    for parameter in source.parameters:
        name = parameter.name
        for step in source.steps:
            expected = run.deltas[step][name]
            assert parameter.shape == tuple(expected.shape)
            torch.testing.assert_close(source.delta(name, step).dense(), expected, atol=1e-7, rtol=1e-5)
        last, first = source.steps[-1], source.steps[0]
        expected = run.deltas[last][name] - run.deltas[first][name]
        torch.testing.assert_close(source.delta(name, last, first).dense(), expected, atol=1e-7, rtol=1e-5)
    assert any(float(run.deltas[step][f"{ROW}.weight"].norm()) > 0.01 for step in source.steps)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_trl_run_has_its_steps_parameters_and_pefts_own_deltas(lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    assert source.name == "peft-adapter"
    assert source.steps == STEPS  # step 0 is where the adapter began, not an observation
    assert len(source.parameters) == 14
    assert {(parameter.rank, parameter.kind) for parameter in source.parameters} == {(4, "lora")}
    assert source.skipped == {}
    assert_deltas_are_pefts(source, lora_run)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"k_proj": 32}},
        {"rank_pattern": {"^model.layers.0.*": 2}, "alpha_pattern": {"^model.layers.0.*": 5}, "use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3.5, "init_lora_weights": "gaussian"},
    ],
    ids=["rslora", "patterns", "regular expressions and rslora", "the first pattern counts", "some modules"],
)
def test_scaling_and_rank_are_pefts(make_lora_run: MakeRun, tmp_path: Path, fields: dict[str, Any]) -> None:
    run = make_lora_run(tmp_path / "run", (5, 10), **fields)
    assert_deltas_are_pefts(open_checkpoints(tmp_path / "run"), run)


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"peft_type": "IA3"}, "checkpoint-unsupported-adapter", "IA3"),
        ({"peft_type": None}, "checkpoint-unsupported-adapter", "None"),
        ({"init_lora_weights": "pissa_niter_4"}, "checkpoint-unsupported-adapter", "pissa_niter_4"),
        ({"rank_pattern": ["q_proj"]}, "checkpoint-damaged", "rank_pattern"),
        ({"alpha_pattern": {"(": 3}}, "checkpoint-damaged", "alpha_pattern"),
        ({"lora_alpha": None}, "checkpoint-damaged", "lora_alpha"),
        ({"r": 8}, "checkpoint-other-model", "model.layers.0.mlp.down_proj"),
    ],
)
def test_a_config_of_no_low_rank_is_refused(
    own_lora_run: LoraRun, change: dict[str, Any], kind: str, name: str
) -> None:
    for step in (0, *STEPS):
        edit_json(own_lora_run.folder(step) / CONFIG, **change)
    with raises_kind(kind, "checkpoint-", name):
        open_checkpoints(own_lora_run.path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tensors_that_are_no_factors_are_skipped_by_name(make_lora_run: MakeRun, tmp_path: Path) -> None:
    run = make_lora_run(
        tmp_path / "run", (5, 10), target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    source = open_checkpoints(tmp_path / "run")
    assert {parameter.name for parameter in source.parameters} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }
    assert set(source.skipped) == {
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.weight",
    }
    stored = load_file(run.folder(10) / WEIGHTS)
    assert all(torch.equal(source.stored(key, 10), stored[key]) for key in source.skipped)


def test_metrics_are_the_last_ones_logged_at_or_before_a_step(lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    assert source.metrics(30) == {"epoch": 0.1, "reward": pytest.approx(0.35)}
    assert source.metrics(33) == source.metrics(30)
    assert source.metrics(35)["reward"] == pytest.approx(0.375)
    assert source.metrics(3) == {}


def test_metrics_of_a_run_folder_come_from_its_log_up_to_a_torn_line(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(60) / STATE).unlink()
    lines = [{"step": 5, "reward": 0.1}, {"step": 10, "reward": 0.2, "text": "x"}, {"step": 10, "loss": 3}]
    log = own_lora_run.path.parent / "metrics.jsonl"
    log.write_bytes(b"".join(map(json_line, lines)) + b'{"step": 20, "rew\xff')
    (log.parent / "journal.jsonl").write_bytes(b"")
    source = open_checkpoints(own_lora_run.path)
    assert source.metrics(9) == {"reward": 0.1}
    assert source.metrics(60) == {"reward": 0.2, "loss": 3.0}


def test_a_damaged_line_of_our_log_is_named_and_ignored_in_other_programs_logs(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(60) / STATE).unlink()
    log = own_lora_run.path.parent / "metrics.jsonl"
    log.write_bytes(json_line({"step": 5, "reward": 0.1}) + b'{"step": 10, "reward": 0.2}\n')
    assert open_checkpoints(own_lora_run.path).metrics(60) == {"reward": 0.1}
    (log.parent / "journal.jsonl").write_bytes(b"")
    with raises_kind("checkpoint-damaged", log, "line 2"):
        open_checkpoints(own_lora_run.path).metrics(60)


def test_metrics_that_are_not_finite_are_left_out(own_lora_run: LoraRun) -> None:
    for step in (10, 20, 30, 40, 50):
        (own_lora_run.folder(step) / STATE).unlink()
    state = own_lora_run.folder(60) / STATE
    state.write_text('{"log_history": [{"step": 10, "reward": 0.5, "loss": NaN, "grad_norm": -Infinity, "x": 1e999}]}')
    assert open_checkpoints(own_lora_run.path).metrics(60) == {"reward": 0.5}
    state.write_text('{"log_history": [{"step": 1' + "0" * 10_000 + "}]}")
    with raises_kind("checkpoint-damaged", state, "64 bits"):
        open_checkpoints(own_lora_run.path).metrics(60)


def test_a_checkpoint_left_of_another_run_is_found_by_its_log(own_lora_run: LoraRun) -> None:
    def log_otherwise(step: int) -> None:
        edit_json(own_lora_run.folder(step) / STATE, log_history=[{"step": 5, "reward": float("nan")}])

    log_otherwise(0)  # a copy of what SFT ended with
    assert open_checkpoints(own_lora_run.path).steps == STEPS
    log_otherwise(10)
    log_otherwise(20)
    with raises_kind("checkpoint-other-model", own_lora_run.folder(30), own_lora_run.folder(20)):
        open_checkpoints(own_lora_run.path)
    assert open_checkpoints([own_lora_run.folder(step) for step in (20, 30)]).steps == (20, 30)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_by_file_and_tensor(own_lora_run: LoraRun, value: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[KEY.format("B")][3, 1] = value

    change_weights(own_lora_run.folder(30), poison)
    source = open_checkpoints(own_lora_run.path)
    source.delta(f"{ROW}.weight", 20)
    with raises_kind("checkpoint-not-finite", own_lora_run.folder(30) / WEIGHTS, KEY.format("B")):
        source.delta(f"{ROW}.weight", 30)


@pytest.mark.parametrize(
    ("lora", "figures"),
    [
        ({"r": 2}, ("(16, 24, 2)", "(16, 24, 4)")),
        ({"lora_alpha": 4}, ("scaled by 1 ", "by 2 ")),
        ({"target_modules": ["q_proj"]}, ("missing",)),
        ({"use_rslora": True}, ("scaled by 4 ", "by 2 ")),
    ],
)
def test_another_run_is_named(
    own_lora_run: LoraRun, make_lora_run: MakeRun, lora: dict[str, Any], figures: tuple[str, ...]
) -> None:
    shutil.rmtree(own_lora_run.folder(30))
    make_lora_run(own_lora_run.path, (30,), **lora)
    named = ("checkpoint-30", "checkpoint-0", "'model.layers.0.mlp.down_proj.weight'")
    with raises_kind("checkpoint-other-model", *named, *figures):
        open_checkpoints(own_lora_run.path)


def test_factors_that_do_not_fit_are_named(own_lora_run: LoraRun) -> None:
    folder = own_lora_run.folder(30)
    change_weights(folder, lambda tensors: tensors.update({KEY.format("A"): torch.zeros(4, 20)}))
    with raises_kind("checkpoint-other-model", folder, f"'{ROW}.weight'", "(16, 20, 4)", "(16, 16, 4)"):
        open_checkpoints(own_lora_run.path)
    change_weights(folder, lambda tensors: tensors.pop(KEY.format("A")))
    with raises_kind("checkpoint-damaged", folder, f"'{ROW}'"):
        open_checkpoints(own_lora_run.path)
    save_file({"x": torch.zeros(2, 2)}, folder / WEIGHTS)
    with raises_kind("checkpoint-unsupported-adapter", folder):
        open_checkpoints(own_lora_run.path)


def test_a_manifest_is_required_only_in_our_own_folders(lora_run: LoraRun, tmp_path: Path) -> None:
    for step in (10, 20):
        shutil.copytree(lora_run.folder(step), tmp_path / "checkpoints" / f"step-{step}")
    assert open_checkpoints(tmp_path / "checkpoints").steps == (10, 20)
    with new_directory(tmp_path / "checkpoints" / "step-30") as new:
        shutil.copytree(lora_run.folder(30), new, dirs_exist_ok=True)
    with raises_kind("checkpoint-incomplete", "step-10/manifest.json"):
        open_checkpoints(tmp_path / "checkpoints")


def test_a_checkpoint_that_is_being_written_is_not_read(own_lora_run: LoraRun) -> None:
    for name in ("tmp-checkpoint-70", ".step-000070.tmp-123", "checkpoint-70.partial"):
        (own_lora_run.path / name).mkdir()
    (own_lora_run.path / "checkpoint-80").write_text("a file")
    assert open_checkpoints(own_lora_run.path).steps == STEPS


def test_a_backbone_is_compared_with_the_run(lora_run: LoraRun, base: Path, tmp_path: Path) -> None:
    assert open_checkpoints(lora_run.path, backbone=base).steps == STEPS
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != f"{ROW}.weight"}, other / "model.safetensors")
    with raises_kind("checkpoint-other-model", other, f"'{ROW}.weight'"):
        open_checkpoints(lora_run.path, backbone=other)
    save_file(tensors | {f"{ROW}.weight": torch.zeros(16, 20)}, other / "model.safetensors")
    with raises_kind("checkpoint-other-model", f"'{ROW}.weight'", "(16, 20)", "(16, 16)"):
        open_checkpoints(lora_run.path, backbone=other)
    with raises_kind("checkpoint-not-found", tmp_path / "none"):
        open_checkpoints(lora_run.path, backbone=tmp_path / "none")


def test_a_folder_without_checkpoints_is_named_and_a_nearby_one_suggested(lora_run: LoraRun, tmp_path: Path) -> None:
    with raises_kind("checkpoint-unknown-layout", tmp_path, "full-model, peft-adapter"):
        open_checkpoints(tmp_path)
    for path in (tmp_path / "none", lora_run.folder(10) / CONFIG):
        with raises_kind("checkpoint-not-found", path):
            open_checkpoints(path)
    for path in (lora_run.path.parent, lora_run.folder(10)):
        with raises_kind("checkpoint-unknown-layout", f"{lora_run.path}?"):
            open_checkpoints(path)


def test_a_layout_can_be_forced_and_must_be_one_that_reads_folders(lora_run: LoraRun, tmp_path: Path) -> None:
    assert open_checkpoints(lora_run.path, layout="peft-adapter").name == "peft-adapter"
    with raises_kind("config-invalid-value", "memory", "full-model, peft-adapter"):
        open_checkpoints(lora_run.path, layout="memory")
    with raises_kind("plugin-unknown", "peft-adaptor", "peft-adapter"):
        open_checkpoints(lora_run.path, layout="peft-adaptor")
    for layout in ("peft-adapter", "full-model"):
        empty = open_checkpoints(tmp_path, layout=layout)
        assert (empty.steps, empty.parameters, dict(empty.skipped)) == ((), (), {})


def test_checkpoints_written_or_removed_since_are_noticed(own_lora_run: LoraRun) -> None:
    kept = own_lora_run.folder(60).rename(own_lora_run.path.parent / "later")
    source = PeftAdapterSource(PeftAdapterSourceConfig(path=own_lora_run.path))
    assert source.steps == STEPS[:-1]
    kept.rename(own_lora_run.path / "checkpoint-60")
    source.refresh()
    assert source.steps == STEPS
    assert_deltas_are_pefts(source, own_lora_run)
    shutil.rmtree(own_lora_run.folder(10))
    source.refresh()
    assert source.steps == STEPS[1:]
    with pytest.raises(CheckpointError, match="step 10"):
        source.delta("model.layers.1.mlp.up_proj.weight", 10)

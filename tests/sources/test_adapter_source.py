"""Adapter checkpoints as PEFT and TRL write them: read exactly, and refused by name when they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.errors import CheckpointError, ConfigError, PluginError
from next_core.interfaces import CheckpointSource
from next_core.sources.adapter_source import PeftAdapterSource, PeftAdapterSourceConfig
from next_core.storage.atomic import new_directory
from next_core.storage.json_lines import json_line
from tests.conftest import STEPS, LoraRun

ROW = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{ROW}.lora_{{}}.weight"


def assert_deltas_are_pefts(source: CheckpointSource, run: LoraRun) -> None:
    assert {parameter.name for parameter in source.parameters} == set(run.deltas[source.steps[0]])
    for parameter in source.parameters:
        name = parameter.name
        for step in source.steps:
            expected = run.deltas[step][name]
            assert parameter.shape == tuple(expected.shape)
            torch.testing.assert_close(dense(source, name, step), expected, atol=1e-7, rtol=1e-5)
        last, first = source.steps[-1], source.steps[0]
        expected = run.deltas[last][name] - run.deltas[first][name]
        torch.testing.assert_close(dense(source, name, last, first), expected, atol=1e-7, rtol=1e-5)
    assert any(float(run.deltas[step][f"{ROW}.weight"].norm()) > 0.01 for step in source.steps)


def dense(source: CheckpointSource, name: str, step: int, since: int | None = None) -> Tensor:
    delta = source.delta(name, step, since)
    assert not isinstance(delta, Tensor)
    return delta.dense()


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(run: LoraRun, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(run.path, **options)
    return str(caught.value)


def test_a_trl_run_has_its_steps_parameters_and_pefts_own_deltas(lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    assert source.name == "peft-adapter"
    assert source.steps == STEPS  # 0 is where the adapter began, and no observation
    assert len(source.parameters) == 14
    assert {(parameter.rank, parameter.kind) for parameter in source.parameters} == {(4, "lora")}
    assert source.skipped == {}
    assert_deltas_are_pefts(source, lora_run)


def test_factors_are_those_of_the_file_and_step_0_can_be_read(lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    stored = load_file(lora_run.folder(30) / "adapter_model.safetensors")
    factors = source.factors(f"{ROW}.weight", 30)
    assert factors is not None
    assert torch.equal(factors.A, stored[KEY.format("A")])
    assert torch.equal(factors.B, stored[KEY.format("B")])
    assert factors.scaling == 2.0
    start = source.factors(f"{ROW}.weight", 0)
    assert start is not None
    assert not start.B.any()


def test_the_projects_own_layout_reads_the_same(
    make_lora_run: Callable[..., LoraRun], tmp_path: Path, lora_run: LoraRun
) -> None:
    for step in (10, 20):
        with new_directory(tmp_path / "checkpoints" / f"step-{step:06d}") as folder:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.copyfile(lora_run.folder(step) / name, folder / name)
    source = open_checkpoints(tmp_path / "checkpoints")
    assert source.steps == (10, 20)
    assert_deltas_are_pefts(source, lora_run)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"k_proj": 32}},
        {"rank_pattern": {"^model.layers.0.*": 2}, "alpha_pattern": {"^model.layers.0.*": 5}, "use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3.5},
        {"init_lora_weights": "gaussian"},
    ],
    ids=[
        "rslora",
        "patterns",
        "regular expressions and rslora",
        "the first pattern counts",
        "some modules",
        "gaussian",
    ],
)
def test_scalings_and_ranks_are_pefts(
    make_lora_run: Callable[..., LoraRun], tmp_path: Path, fields: dict[str, Any]
) -> None:
    run = make_lora_run(tmp_path / "run", (5, 10), **fields)
    assert_deltas_are_pefts(open_checkpoints(tmp_path / "run"), run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "DoRA's delta is not low-rank"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA adapters can be extrapolated"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base weights"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"r": "four"}, "'four'"),
        ({"r": 8}, "'model.layers.0.mlp.down_proj' has rank 4 but adapter_config.json says 8"),
    ],
)
def test_a_config_that_does_not_give_low_rank_deltas_is_refused_with_the_reason(
    own_lora_run: LoraRun, change: dict[str, Any], reason: str
) -> None:
    for step in (0, *STEPS):
        change_config(own_lora_run.folder(step), **change)
    message = refusal(own_lora_run)
    assert "checkpoint-" in message
    assert reason in message


def test_a_real_dora_run_is_refused(make_lora_run: Callable[..., LoraRun], tmp_path: Path, base: Path) -> None:
    run = make_lora_run(tmp_path / "run", (), use_dora=True)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(use_dora=True, target_modules=["q_proj"], r=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(run.path / "checkpoint-1")
    assert "train with use_dora=False, or extrapolate merged checkpoints" in refusal(run)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_is_no_lora_factor_is_skipped_by_name_and_carried_along(
    make_lora_run: Callable[..., LoraRun], tmp_path: Path
) -> None:
    run = make_lora_run(
        tmp_path / "run", (5, 10), target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    source = open_checkpoints(tmp_path / "run")
    assert isinstance(source, PeftAdapterSource)
    assert {parameter.name for parameter in source.parameters} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }
    assert set(source.skipped) == {
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.weight",
    }
    assert set(source.skipped.values()) == {"not a LoRA factor of a linear layer"}
    stored = load_file(run.folder(10) / "adapter_model.safetensors")
    for key, tensor in source.extra_tensors(10).items():
        assert torch.equal(tensor, stored[key])


def test_metrics_are_the_last_ones_logged_at_or_before_a_step(lora_run: LoraRun) -> None:
    source = open_checkpoints(lora_run.path)
    assert source.metrics(30) == {"epoch": 0.1, "reward": pytest.approx(0.35)}
    assert source.metrics(33) == source.metrics(30)
    assert source.metrics(35)["reward"] == pytest.approx(0.375)
    assert source.metrics(3) == {}


def test_a_run_without_a_trainer_state_has_no_metrics(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(60) / "trainer_state.json").unlink()
    assert open_checkpoints(own_lora_run.path).metrics(30) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"log_history": 5}', '{"log_history": {"a": 1}}', "\x00", "[" * 100_000])
def test_a_trainer_state_that_cannot_be_read_is_named_when_metrics_are_asked_for(
    own_lora_run: LoraRun, text: str
) -> None:
    (own_lora_run.folder(60) / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint-60/trainer_state\.json"):
        open_checkpoints(own_lora_run.path).metrics(30)


def test_metrics_of_a_run_folder_come_from_its_log_up_to_a_torn_line(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(60) / "trainer_state.json").unlink()
    lines = [{"step": 5, "reward": 0.1}, {"step": 10, "reward": 0.2, "text": "x"}, {"step": 10, "loss": 3}]
    log = own_lora_run.path.parent / "metrics.jsonl"
    log.write_bytes(b"".join(map(json_line, lines)) + b'{"step": 20, "rew\xff')
    (log.parent / "journal.jsonl").write_bytes(b"")
    source = open_checkpoints(own_lora_run.path)
    assert source.metrics(9) == {"reward": 0.1}
    assert source.metrics(60) == {"reward": 0.2, "loss": 3.0}


def test_a_damaged_line_of_a_log_of_ours_is_named_and_a_strangers_log_is_left_alone(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(60) / "trainer_state.json").unlink()
    log = own_lora_run.path.parent / "metrics.jsonl"
    log.write_bytes(json_line({"step": 5, "reward": 0.1}) + b'{"step": 10, "reward": 0.2}\n')
    assert open_checkpoints(own_lora_run.path).metrics(60) == {"reward": 0.1}
    (log.parent / "journal.jsonl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{log} is damaged \(line 2: it has no checksum\); restore it"):
        open_checkpoints(own_lora_run.path).metrics(60)


def test_numbers_that_are_not_finite_are_no_metrics(own_lora_run: LoraRun) -> None:
    state = own_lora_run.folder(60) / "trainer_state.json"
    state.write_text('{"log_history": [{"step": 10, "reward": 0.5, "loss": NaN, "grad_norm": -Infinity, "x": 1e999}]}')
    assert open_checkpoints(own_lora_run.path).metrics(60) == {"reward": 0.5}
    state.write_text('{"log_history": [{"step": 1' + "0" * 10_000 + "}]}")
    with pytest.raises(CheckpointError, match=rf"{state} cannot be read \(1000.* does not fit in 64 bits"):
        open_checkpoints(own_lora_run.path).metrics(60)


def test_a_missing_adapter_is_named(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(30) / "adapter_model.safetensors").unlink()
    assert "checkpoint-30/adapter_model.safetensors is missing; the checkpoint is incomplete" in refusal(own_lora_run)


def test_a_missing_config_is_named(own_lora_run: LoraRun) -> None:
    (own_lora_run.folder(30) / "adapter_config.json").unlink()
    assert "checkpoint-30/adapter_config.json is missing" in refusal(own_lora_run)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x01", "null", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(own_lora_run: LoraRun, text: str) -> None:
    (own_lora_run.folder(30) / "adapter_config.json").write_text(text)
    assert "checkpoint-30/adapter_config.json" in refusal(own_lora_run)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_adapter_is_named(own_lora_run: LoraRun, size: int) -> None:
    path = own_lora_run.folder(30) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(own_lora_run)
    assert "checkpoint-30/adapter_model.safetensors is truncated or not a safetensors file" in message
    assert "remove or restore this checkpoint" in message


def test_a_pickle_is_refused(own_lora_run: LoraRun) -> None:
    folder = own_lora_run.folder(30)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "checkpoint-30/adapter_model.bin is a pickle, which can run code" in refusal(own_lora_run)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_by_file_and_tensor(own_lora_run: LoraRun, value: float) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[KEY.format("B")][3, 1] = value

    change_weights(own_lora_run.folder(30), poison)
    source = open_checkpoints(own_lora_run.path)
    source.delta(f"{ROW}.weight", 20)
    with pytest.raises(CheckpointError) as caught:
        source.delta(f"{ROW}.weight", 30)
    assert "checkpoint-30/adapter_model.safetensors" in str(caught.value)
    assert KEY.format("B") in str(caught.value)


@pytest.mark.parametrize("lora", [{"r": 2}, {"lora_alpha": 4}, {"target_modules": ["q_proj"]}, {"use_rslora": True}])
def test_a_checkpoint_of_another_run_is_named(
    own_lora_run: LoraRun, make_lora_run: Callable[..., LoraRun], tmp_path: Path, lora: dict[str, Any]
) -> None:
    shutil.rmtree(own_lora_run.folder(30))
    make_lora_run(own_lora_run.path, (30,), **lora)
    message = refusal(own_lora_run)
    assert "checkpoint-30" in message
    assert "checkpoint-0" in message
    if "r" in lora:
        assert "is (16, 24, 2) but (16, 24, 4) in" in message
        assert "(rows, columns, rank)" in message
    elif "target_modules" in lora:
        assert "'model.layers.0.mlp.down_proj.weight' is missing" in message
    else:
        assert "'model.layers.0.mlp.down_proj.weight' is scaled by " in message


def test_a_checkpoint_of_another_model_size_is_named(own_lora_run: LoraRun) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[KEY.format("A")] = torch.zeros(4, 20)

    change_weights(own_lora_run.folder(30), widen)
    message = refusal(own_lora_run)
    assert "checkpoint-30" in message
    assert f"'{ROW}.weight' is (16, 20, 4) but (16, 16, 4) in" in message


def test_a_factor_without_its_other_half_is_named(own_lora_run: LoraRun) -> None:
    change_weights(own_lora_run.folder(30), lambda tensors: tensors.pop(KEY.format("A")))
    assert f"factors of '{ROW}' do not fit" in refusal(own_lora_run)


def test_an_adapter_without_lora_factors_is_refused(own_lora_run: LoraRun) -> None:
    def empty(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors["x"] = torch.zeros(2, 2)

    change_weights(own_lora_run.folder(0), empty)
    assert "holds no LoRA factors" in refusal(own_lora_run)


def test_a_step_that_is_there_twice_is_named(own_lora_run: LoraRun) -> None:
    shutil.copytree(own_lora_run.folder(10), own_lora_run.path / "step-000010")
    message = refusal(own_lora_run)
    assert "step 10 is there twice: " in message
    assert "checkpoint-10" in message
    assert "step-000010" in message


def test_an_own_checkpoint_that_does_not_fit_its_manifest_is_named(lora_run: LoraRun, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-000010"
    with new_directory(folder) as new:
        shutil.copytree(lora_run.folder(10), new, dirs_exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors is missing or truncated \(\d+ bytes expected"
    ):
        open_checkpoints(folder.parent)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000010/manifest\.json cannot be read.*remove or restore it"):
        open_checkpoints(folder.parent)


def test_of_a_strangers_folders_no_manifest_is_demanded_and_of_ours_wherever_they_were_copied(
    lora_run: LoraRun, tmp_path: Path
) -> None:
    for step in (10, 20):
        shutil.copytree(lora_run.folder(step), tmp_path / "checkpoints" / f"step-{step}")
    assert open_checkpoints(tmp_path / "checkpoints").steps == (10, 20)
    with new_directory(tmp_path / "checkpoints" / "step-30") as new:
        shutil.copytree(lora_run.folder(30), new, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"step-10/manifest\.json cannot be read"):
        open_checkpoints(tmp_path / "checkpoints")


def test_a_checkpoint_that_is_being_written_is_not_seen(own_lora_run: LoraRun) -> None:
    (own_lora_run.path / "tmp-checkpoint-70").mkdir()
    (own_lora_run.path / ".step-000070.tmp-123").mkdir()
    (own_lora_run.path / "checkpoint-70.partial").mkdir()
    (own_lora_run.path / "checkpoint-80").write_text("a file")
    assert open_checkpoints(own_lora_run.path).steps == STEPS


def test_a_backbone_of_the_run_is_accepted(lora_run: LoraRun, base: Path) -> None:
    assert open_checkpoints(lora_run.path, backbone=base).steps == STEPS


def test_a_backbone_of_another_model_is_named_with_the_parameter(lora_run: LoraRun, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != f"{ROW}.weight"}, other / "model.safetensors")
    assert f"has no '{ROW}.weight'; it is not the model of this run" in refusal(lora_run, backbone=other)
    save_file(tensors | {f"{ROW}.weight": torch.zeros(16, 20)}, other / "model.safetensors")
    message = refusal(lora_run, backbone=other)
    assert f"'{ROW}.weight' is (16, 20) but the run has (16, 16)" in message
    assert "does not exist" in refusal(lora_run, backbone=tmp_path / "none")


def test_a_folder_without_checkpoints_is_told_what_is_expected(lora_run: LoraRun, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoints of a known layout \(full-model, peft-adapter\)"):
        open_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder; pass the folder that holds checkpoint-N or step-N"):
        open_checkpoints(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoints(lora_run.folder(10) / "adapter_config.json")


def test_a_folder_next_to_the_checkpoints_is_pointed_to_them(lora_run: LoraRun) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean .*/checkpoints\?"):
        open_checkpoints(lora_run.path.parent)
    with pytest.raises(CheckpointError, match=r"did you mean .*/checkpoints\?"):
        open_checkpoints(lora_run.folder(10))


def test_a_layout_can_be_forced_and_must_be_one_that_reads_folders(lora_run: LoraRun) -> None:
    assert open_checkpoints(lora_run.path, layout="peft-adapter").name == "peft-adapter"
    with pytest.raises(ConfigError, match="source 'memory' does not read folders; layouts: full-model, peft-adapter"):
        open_checkpoints(lora_run.path, layout="memory")
    with pytest.raises(PluginError, match=r"unknown source 'peft-adaptor'\. Did you mean 'peft-adapter'"):
        open_checkpoints(lora_run.path, layout="peft-adaptor")


def test_an_empty_folder_whose_layout_is_forced_has_no_steps_and_no_parameters(tmp_path: Path) -> None:
    for layout in ("peft-adapter", "full-model"):
        source = open_checkpoints(tmp_path, layout=layout)
        assert (source.steps, source.parameters, dict(source.skipped)) == ((), (), {})


def test_a_step_that_was_not_observed_is_named_with_those_that_were(lora_run: LoraRun) -> None:
    with pytest.raises(CheckpointError, match="step 35 was not observed; observed steps: "):
        open_checkpoints(lora_run.path).delta(f"{ROW}.weight", 35)


def test_a_parameter_that_is_not_there_is_named(lora_run: LoraRun) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor .*nothing"):
        open_checkpoints(lora_run.path).delta("model.nothing.weight", 30)


def test_checkpoints_written_since_are_taken_in(own_lora_run: LoraRun) -> None:
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
    with pytest.raises(CheckpointError, match="step 10 was not observed"):
        source.delta("model.layers.1.mlp.up_proj.weight", 10)


def test_half_precision_factors_are_read_in_fp32(own_lora_run: LoraRun) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()

    change_weights(own_lora_run.folder(30), halve)
    factors = open_checkpoints(own_lora_run.path).factors(f"{ROW}.weight", 30)
    assert factors is not None
    assert factors.A.dtype == torch.float32

"""A written model loads as any Hugging Face model, and is the backbone plus what was trained plus the jump."""

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

from next_core import make_applier, make_predictor, open_checkpoints
from next_core.errors import CheckpointError, ConfigError, GuardError
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.storage.manifest import check_manifest
from tests.conftest import LoraRun, noise

ROW = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def run(make_lora_run: Callable[..., LoraRun], tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    return make_lora_run(tmp_path_factory.mktemp("run") / "checkpoints", (0, 10, 20), use_rslora=True, r=3)


@pytest.fixture(scope="module")
def sharded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base in several shards."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).double()


def predict(run: LoraRun, backbone: Path) -> Prediction:
    source = open_checkpoints(run.path, backbone=backbone)
    updates = {name: CoefficientUpdate({20: 1.0, 10: -1.0}) for name in run.deltas[20]}
    return Prediction(
        source, 20, 10, updates={**updates, ROW: LowRankUpdate(LowRank(noise("l", 16, 1), noise("r", 1, 16)))}
    )


def expected(run: LoraRun, alpha: float) -> Any:
    model = load(run.base)
    with torch.no_grad():
        for name in run.deltas[20]:
            newest, before = run.deltas[20][name], run.deltas[10][name]
            jump = noise("l", 16, 1).double() @ noise("r", 1, 16).double() if name == ROW else newest - before
            model.get_parameter(name).add_(newest + alpha * jump)
    return model


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_the_model_loads_with_the_logits_of_the_explicit_weights(
    run: LoraRun, sharded: Path, layout: str, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    backbone = run.base if layout == "one file" else sharded
    before = {path.name: path.read_bytes() for path in backbone.iterdir()}
    make_applier("merged-model").apply(predict(run, backbone), alpha=1.5, out=tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(expected(run, 1.5)), atol=1e-5, rtol=1e-5)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *before,
        "manifest.json",
        "extrapolation.json",
        "README.md",
    }
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    check_manifest(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in backbone.iterdir()} == before


def test_a_written_model_is_a_backbone_for_the_next_run(run: LoraRun, tmp_path: Path) -> None:
    make_applier("merged-model").apply(predict(run, run.base), out=tmp_path / "first")
    make_applier("merged-model").apply(predict(run, tmp_path / "first"), out=tmp_path / "second")
    check_manifest(tmp_path / "second")
    assert (
        load_file(tmp_path / "second" / "model.safetensors").keys() == load_file(run.base / "model.safetensors").keys()
    )


def test_the_model_and_the_adapter_of_one_prediction_say_the_same(
    run: LoraRun, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    from peft import PeftModel

    prediction = (
        make_predictor("secant", space="factors").fit(History(open_checkpoints(run.path, run.base))).predict(10)
    )
    make_applier("merged-model").apply(prediction, alpha=2.0, out=tmp_path / "model")
    make_applier("peft-adapter").apply(prediction, alpha=2.0, out=tmp_path / "adapter")
    adapter = logits(PeftModel.from_pretrained(load(run.base), tmp_path / "adapter"))
    torch.testing.assert_close(logits(load(tmp_path / "model")), adapter, atol=1e-5, rtol=1e-5)


def test_the_backbone_can_be_named_by_the_applier_and_is_not_written_into(run: LoraRun, tmp_path: Path) -> None:
    source = open_checkpoints(run.path)
    prediction = Prediction(source, 20, 10)
    with pytest.raises(ConfigError, match="needs the base model; pass --backbone FOLDER"):
        make_applier("merged-model").apply(prediction, out=tmp_path / "out")
    copy = Path(shutil.copytree(run.base, tmp_path / "base"))
    with pytest.raises(ConfigError, match="which is being read"):
        make_applier("merged-model", backbone=copy).apply(prediction, out=copy / "new")
    make_applier("merged-model", backbone=copy).apply(prediction, out=tmp_path / "out")
    trained = load_file(run.base / "model.safetensors")[ROW] + run.deltas[20][ROW].float()
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[ROW], trained, atol=1e-6, rtol=1e-5)


def test_the_backbones_precision_is_kept_and_what_does_not_fit_it_is_refused(run: LoraRun, tmp_path: Path) -> None:
    half = Path(shutil.copytree(run.base, tmp_path / "half"))
    save_file({k: v.half() for k, v in load_file(run.base / "model.safetensors").items()}, half / "model.safetensors")
    source = open_checkpoints(run.path, half)
    make_applier("merged-model").apply(Prediction(source, 20, 10), out=tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    large = LowRankUpdate(LowRank(torch.full((16, 1), 1e5), torch.ones(1, 16)))
    with pytest.raises(GuardError, match=f"'{ROW}' overflows torch.float16 after the jump; nothing was written"):
        make_applier("merged-model").apply(Prediction(source, 20, 10, updates={ROW: large}), out=tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_a_backbone_of_another_model_is_refused(run: LoraRun, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.base, tmp_path / "other"))
    save_file({"x": torch.zeros(2, 2)}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is not the model of this run"):
        make_applier("merged-model", backbone=other).apply(
            Prediction(open_checkpoints(run.path), 20, 10), out=tmp_path / "o"
        )


def test_an_adapter_that_trains_more_than_matrices_is_not_merged_without_it(
    make_lora_run: Callable[..., LoraRun], tmp_path: Path
) -> None:
    run = make_lora_run(tmp_path / "run", (10, 20), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"'base_model\.model\.lm_head\.weight'.* would lose; use .*'peft-adapter'"):
        make_applier("merged-model").apply(Prediction(open_checkpoints(run.path, run.base), 20, 10), out=tmp_path / "o")


def test_an_adapter_of_transposed_layers_is_not_merged(own_lora_run: LoraRun, tmp_path: Path) -> None:
    path = own_lora_run.folder(60) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    source = open_checkpoints(own_lora_run.path, own_lora_run.base)
    with pytest.raises(ConfigError, match="fan_in_fan_out"):
        make_applier("merged-model").apply(Prediction(source, 60, 10), out=tmp_path / "out")


@pytest.fixture
def full_run(tmp_path: Path, base: Path) -> dict[int, dict[str, Tensor]]:
    """A full-parameter run in ``tmp_path/checkpoints``, whose norms train too."""
    start = load_file(base / "model.safetensors")
    weights = {0: start}
    for step in (10, 20):
        weights[step] = {key: value + 0.001 * step * noise(f"{key}", *value.shape) for key, value in start.items()}
        folder = Path(shutil.copytree(base, tmp_path / "checkpoints" / f"checkpoint-{step}"))
        save_file(weights[step], folder / "model.safetensors")
    return weights


def test_of_a_full_parameter_run_matrices_jump_and_the_rest_stays_as_trained(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path
) -> None:
    source = open_checkpoints(tmp_path / "checkpoints", backbone=base)
    prediction = make_predictor("secant").fit(History(source)).predict(10)
    make_applier("merged-model").apply(prediction, alpha=2.0, out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == full_run[0].keys()
    for key, value in written.items():
        trained = full_run[20][key]
        jumped = trained + 2.0 * (trained - full_run[10][key]) if trained.dim() == 2 else trained
        torch.testing.assert_close(value, jumped, atol=1e-6, rtol=1e-5)


def test_a_full_parameter_run_can_be_written_over_another_copy_of_its_backbone(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path
) -> None:
    source = open_checkpoints(tmp_path / "checkpoints")
    make_applier("merged-model", backbone=base).apply(Prediction(source, 20, 10), out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, full_run[20][key]) for key, value in written.items())


def test_a_jump_of_the_run_is_in_the_model_that_is_written(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path
) -> None:
    folder = tmp_path / "jumps" / "0001"
    folder.mkdir(parents=True)
    save_file({ROW: noise("jump", 16, 16)}, folder / "shift.safetensors")
    (folder / "jump.json").write_text(json.dumps({"step": 10, "alpha": 1.0, "adapter": None}))
    source = open_checkpoints(tmp_path / "checkpoints", backbone=base)
    make_applier("merged-model").apply(Prediction(source, 20, 10), out=tmp_path / "out")
    # Step 20 came after the jump, and its file has it.
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[ROW], full_run[20][ROW])


def half_precision(base: Path, to: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder = Path(shutil.copytree(base, to))
    save_file({k: v.to(dtype) for k, v in load_file(base / SHARD).items()}, folder / SHARD, metadata={"format": "pt"})
    return folder


SHARD = "model.safetensors"


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_share_that_landed_is_that_of_the_files(run: LoraRun, tmp_path: Path, rounding: str) -> None:
    half = half_precision(run.base, tmp_path / "half")
    prediction = predict(run, half)
    applied = make_applier("merged-model", rounding=rounding).apply(prediction, alpha=0.05, out=tmp_path / "out")
    backbone, written = load_file(half / SHARD), load_file(tmp_path / "out" / SHARD)
    along = wanted_sum = 0.0
    for name in run.deltas[20]:
        trained = run.deltas[20][name]
        other = noise("l", 16, 1).double() @ noise("r", 1, 16).double()
        jump = 0.05 * (other if name == ROW else trained - run.deltas[10][name])
        start = (backbone[name].double() + trained).float().bfloat16().double()
        share = ((written[name].double() - start) * jump).sum() / (jump * jump).sum()
        assert applied.landed[name] == pytest.approx(float(share), rel=1e-3, abs=1e-3)
        whole = trained + jump
        along += float(((written[name].double() - backbone[name].double()) * whole).sum())
        wanted_sum += float((whole * whole).sum())
    assert applied.update_share == pytest.approx(along / wanted_sum, rel=1e-3)
    record = json.loads((tmp_path / "out" / "extrapolation.json").read_text())
    assert record["share_of_jump"] == pytest.approx(applied.share)
    assert record["share_of_update"] == pytest.approx(applied.update_share)
    assert next(iter(record["lowest_shares_of_jump"].items())) == min(applied.landed.items(), key=lambda item: item[1])
    assert (record["step"], record["horizon"], record["alpha"]) == (20, 10, 0.05)
    assert record["rounding"] == rounding
    changed = sum(
        int((written[n] != (backbone[n].double() + d).float().bfloat16()).sum()) for n, d in run.deltas[20].items()
    )
    assert record["elements_changed"] == pytest.approx(changed, rel=0.01)


def test_all_of_a_jump_lands_in_full_precision(run: LoraRun, tmp_path: Path) -> None:
    applied = make_applier("merged-model").apply(predict(run, run.base), out=tmp_path / "out")
    assert applied.share == pytest.approx(1.0, abs=1e-5)
    assert set(applied.landed) == set(run.deltas[20])


def test_stochastic_rounding_is_the_same_each_time_and_another_with_another_seed(run: LoraRun, tmp_path: Path) -> None:
    prediction = predict(run, half_precision(run.base, tmp_path / "half"))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_applier("merged-model", rounding="stochastic", seed=seed).apply(prediction, out=tmp_path / name)
    a, b, c = ((tmp_path / name / SHARD).read_bytes() for name in "abc")
    assert a == b != c
    with pytest.raises(ConfigError, match="set rounding: stochastic"):
        make_applier("merged-model", seed=3)


@pytest.fixture
def tied_run(tmp_path: Path, base: Path) -> tuple[Path, Path]:
    """A full-parameter run of a tied model whose checkpoints store the one matrix once, and its base."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True})
    backbone = tmp_path / "tied"
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(backbone)
    start = load_file(backbone / SHARD)
    assert "lm_head.weight" not in start
    for step in (10, 20):
        folder = Path(shutil.copytree(backbone, tmp_path / "checkpoints" / f"checkpoint-{step}"))
        moved = {k: (v.float() + 0.001 * step * noise(k, *v.shape)).bfloat16() for k, v in start.items()}
        save_file(moved, folder / SHARD, metadata={"format": "pt"})
    return tmp_path / "checkpoints", backbone


@pytest.mark.parametrize("stored", ["embeddings", "both"])
def test_a_tied_model_is_written_with_the_names_of_the_backbone_and_one_matrix(
    tied_run: tuple[Path, Path], tmp_path: Path, stored: str
) -> None:
    checkpoints, backbone = tied_run
    tensors = load_file(backbone / SHARD)
    if stored == "both":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, backbone / SHARD, metadata={"format": "pt"})
    source = open_checkpoints(checkpoints, backbone=backbone)
    prediction = make_predictor("secant").fit(History(source)).predict(10)
    make_applier("merged-model", rounding="stochastic").apply(prediction, out=tmp_path / "out")
    written = load_file(tmp_path / "out" / SHARD)
    assert written.keys() == tensors.keys()
    one = written["model.embed_tokens.weight"]
    assert not torch.equal(one, tensors["model.embed_tokens.weight"])
    assert torch.equal(one, written.get("lm_head.weight", one))
    assert torch.equal(load(tmp_path / "out").lm_head.weight, one.double())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_lora_of_a_tied_head_is_not_merged(make_lora_run: Callable[..., LoraRun], tmp_path: Path) -> None:
    run = make_lora_run(tmp_path / "run", (10, 20), target_modules=["q_proj", "lm_head"])
    for step in (10, 20):  # as with save_embedding_layers=False
        path = run.folder(step) / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if "base_layer" not in key}, path)
    backbone = Path(shutil.copytree(run.base, tmp_path / "tied"))
    tensors = load_file(backbone / SHARD)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, backbone / SHARD, metadata={"format": "pt"})
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"shares its weights with 'model\.embed_tokens\.weight'"):
        make_applier("merged-model").apply(
            Prediction(open_checkpoints(run.path, backbone), 20, 10), out=tmp_path / "out"
        )


def test_a_quantised_matrix_is_not_jumped(run: LoraRun, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(run.base, tmp_path / "odd"))
    tensors = load_file(run.base / SHARD)
    tensors[ROW] = tensors[ROW].to(torch.int8)
    save_file(tensors, odd / SHARD, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"'{ROW}' is stored as I8"):
        make_applier("merged-model").apply(predict(run, odd), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named_and_not_called_an_overflow(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path
) -> None:
    path = tmp_path / "checkpoints" / "checkpoint-10" / SHARD
    save_file(full_run[10] | {ROW: torch.full((16, 16), float("nan"))}, path, metadata={"format": "pt"})
    source = open_checkpoints(tmp_path / "checkpoints", backbone=base)
    prediction = Prediction(source, 20, 10, updates={ROW: CoefficientUpdate({20: 1.0, 10: -1.0})})
    with pytest.raises(CheckpointError, match=r"checkpoint-10.*NaN"):
        make_applier("merged-model").apply(prediction, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("anchor", ["newest", "backbone"])
def test_low_rank_and_coefficient_jumps_of_a_full_run_are_the_explicit_ones(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path, anchor: Any
) -> None:
    source = open_checkpoints(tmp_path / "checkpoints", backbone=base)
    other = "model.layers.1.mlp.up_proj.weight"
    low = LowRank(noise("l", 16, 1), noise("r", 1, 16))
    updates = {ROW: LowRankUpdate(low), other: CoefficientUpdate({20: 1.25, 10: -0.5})}
    prediction = Prediction(source, 20, 10, anchor, updates, {other: 0.5})
    make_applier("merged-model").apply(prediction, alpha=2.0, out=tmp_path / "out")
    written = load_file(tmp_path / "out" / SHARD)
    start, ten, twenty = (full_run[step] for step in (0, 10, 20))
    back = 1.0 if anchor == "backbone" else 0.0
    jump = {
        ROW: 2.0 * (low.dense() - back * (twenty[ROW] - start[ROW])),
        other: (1.25 - back) * (twenty[other] - start[other]) - 0.5 * (ten[other] - start[other]),
    }
    for name, moved in jump.items():
        torch.testing.assert_close(written[name], twenty[name] + moved, atol=1e-6, rtol=1e-5)

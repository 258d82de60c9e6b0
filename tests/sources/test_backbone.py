"""The base models that people have: other names of the same tensors, quantised ones, wrapped ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import make_applier, open_checkpoints
from next_core.interfaces import CoefficientUpdate, Prediction
from next_core.sources.hf_model import ModelFiles
from tests.appliers.matrix import LLAVA
from tests.conftest import LoraRun, noise
from tests.errors import raises_kind
from tests.sources.models import SMALL, built, straight_run

MODEL = "model.safetensors"
AS_IN_MEMORY = {"save_original_format": False}


def vision_language() -> Any:
    architecture, config, sizes = LLAVA
    return built(architecture, config, **sizes)


@pytest.mark.parametrize("stored", [{}, AS_IN_MEMORY], ids=["names of the Hub", "names in memory"])
def test_an_adapter_is_merged_into_a_base_with_either_names(stored: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    vision_language().save_pretrained(tmp_path / "base", **stored)
    model = get_peft_model(vision_language(), LoraConfig(r=2, target_modules=r".*language_model.*\.(q|down)_proj"))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.copy_(noise(key, *value.shape))
    model.save_pretrained(tmp_path / "checkpoints" / "checkpoint-10")
    source = open_checkpoints(tmp_path / "checkpoints", backbone=tmp_path / "base")
    make_applier("merged-model").apply(Prediction(source, 10, 10), out=tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "expected", **stored)
    found, expected = load_file(tmp_path / "out" / MODEL), load_file(tmp_path / "expected" / MODEL)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_transformers_to_ask_the_message_says_that_names_may_differ(tmp_path: Path) -> None:
    run = straight_run(tmp_path, vision_language(), base={}, **AS_IN_MEMORY)
    (run.base / "config.json").unlink()
    with raises_kind("checkpoint-other-model", run.base, "transformers", "names"):
        open_checkpoints(run.path, backbone=run.base)


W, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
CODES = torch.arange(32).to(torch.uint8).reshape(32, 1)
FORMATS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "fp8": (
        {W: torch.ones(8, 8).to(torch.float8_e4m3fn), f"{W}_scale_inv": torch.full((1, 1), 0.5)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8",
    ),
    "bitsandbytes": (
        {W: CODES, f"{W}.absmax": torch.ones(1), f"{W}.quant_map": torch.ones(16)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "4-bit",
    ),
    "GPTQ": (
        {W.replace("weight", "qweight"): torch.ones(1, 8).int(), W.replace("weight", "scales"): torch.ones(1, 8)},
        {"quant_method": "gptq", "bits": 4},
        "4-bit",
    ),
    "AWQ": (
        {W.replace("weight", "qweight"): torch.ones(8, 1).int(), W.replace("weight", "scales"): torch.ones(1, 8)},
        {"quant_method": "awq", "bits": 4},
        "4-bit",
    ),
    "fp8 experts": (
        {"experts.gate_up_proj": torch.ones(2, 8, 8).to(torch.float8_e4m3fn), "experts.gate_up_proj_scale_inv": CODES},
        {"quant_method": "fp8"},
        "fp8",
    ),
    "fp8 with scales in the config": ({W: torch.ones(8, 8).to(torch.float8_e4m3fn)}, {"quant_method": "fp8"}, "fp8"),
    "of a quantizer of the future": ({W: CODES}, {"quant_method": "next"}, "next"),
    "without a config": ({W: CODES, f"{W}.absmax": torch.ones(1)}, {}, "absmax"),
}


def quantized(folder: Path, method: str) -> Path:
    tensors, config, _ = FORMATS[method]
    folder.mkdir()
    save_file(tensors | {NORM: torch.ones(8)}, folder / MODEL)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


@pytest.mark.parametrize("method", FORMATS)
def test_a_quantized_base_is_refused_where_its_weights_are_read(method: str, tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", method)
    for step in (10, 20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        save_file({W: step * torch.ones(8, 8)}, tmp_path / "run" / f"checkpoint-{step}" / MODEL)
    with raises_kind("checkpoint-unsupported-model", base, FORMATS[method][2], "unquantised"):
        open_checkpoints(tmp_path / "run", backbone=base)
    source = open_checkpoints(tmp_path / "run")
    with raises_kind("checkpoint-unsupported-model", base, FORMATS[method][2]):
        make_applier("merged-model", backbone=base).check_source(source, tmp_path / "out")


def test_an_adapter_needs_no_weights_of_a_quantized_base(lora_run: LoraRun, tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", "GPTQ")
    source = open_checkpoints(lora_run.path, backbone=base)
    name = source.parameters[0].name
    jump = Prediction(source, 60, 10, updates={name: CoefficientUpdate({60: 1.0, 50: -1.0}, "factors")})
    make_applier("peft-adapter").apply(jump, out=tmp_path / "out")
    with raises_kind("checkpoint-unsupported-model", base):
        make_applier("merged-model").apply(jump, out=tmp_path / "merged")


def test_checkpoints_that_are_quantized_are_refused(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "checkpoint-10", "fp8")
    with raises_kind("checkpoint-unsupported-model", folder):
        open_checkpoints(tmp_path)


def small_run(tmp_path: Path, rename: Callable[[str], str]) -> Path:
    for step in (0, 10, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        tensors = {W: step * torch.ones(3, 2), NORM: torch.ones(2)}
        save_file({rename(name): value for name, value in tensors.items()}, folder / MODEL)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_names_of_wrappers_are_stripped(rename: Callable[[str], str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({W: torch.ones(3, 2), NORM: torch.ones(2)}, base / MODEL)
    source = open_checkpoints(small_run(tmp_path, rename), backbone=base)
    assert [parameter.name for parameter in source.parameters] == [W]
    jump = Prediction(source, 20, 10, updates={W: CoefficientUpdate({20: 1.0, 10: -1.0})})
    make_applier("merged-model").apply(jump, out=tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / MODEL)[W], torch.full((3, 2), 30.0))
    save_file({rename(W): torch.ones(3, 2), rename(NORM): torch.ones(2)}, base / MODEL)
    with raises_kind("checkpoint-other-names", base, rename(W)):
        make_applier("merged-model").check_source(source, tmp_path / "more")


def test_a_parameter_with_and_without_the_name_of_a_wrapper_is_damage(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2), "_orig_mod.a.weight": torch.ones(2, 2)}, tmp_path / MODEL)
    with raises_kind("checkpoint-damaged", tmp_path):
        ModelFiles(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.default.weight",
        "model.layers.0.mlp.up_proj.base_layer.weight",
        "model.lm_head.modules_to_save.default.weight",
    ],
)
def test_the_state_of_a_peft_model_is_no_full_model(name: str, tmp_path: Path) -> None:
    with raises_kind("checkpoint-unsupported-adapter", name, "merge_and_unload"):
        open_checkpoints(small_run(tmp_path, lambda each: name if each == W else each))


@pytest.mark.parametrize("rows", [31, 40])
def test_a_resized_vocabulary_is_named_with_the_remedy(rows: int, tmp_path: Path) -> None:
    model = built("Qwen2ForCausalLM", "Qwen2Config", **SMALL, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "checkpoints" / "checkpoint-20")
    with raises_kind("checkpoint-other-vocabulary", f"resize_token_embeddings({rows})", "32", tmp_path / "base"):
        open_checkpoints(tmp_path / "checkpoints", backbone=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "checkpoints" / "checkpoint-10")
    with raises_kind("checkpoint-other-model", "vocabulary", f"({rows}, 16)", "(32, 16)", "checkpoint-20"):
        open_checkpoints(tmp_path / "checkpoints")

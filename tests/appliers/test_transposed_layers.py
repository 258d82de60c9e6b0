"""GPT-2's layers store (in, out): what PEFT's product is added to depends on the class of a module, not on a flag."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import make_applier, open_checkpoints
from next_core.interfaces import LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from tests.conftest import LoraRun, noise
from tests.errors import raises_kind
from tests.sources.models import built, edit_json

SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 32}
SQUARE = "transformer.h.0.attn.c_proj"
MODEL = "model.safetensors"


def gpt2() -> Any:
    return built("GPT2LMHeadModel", "GPT2Config", **SIZES)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """LoRA checkpoints 10 and 20 of all layers of a GPT-2, its base, and the models that PEFT merges them into."""
    from peft import LoraConfig, get_peft_model

    gpt2().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config)
    for step in (10, 20):
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.copy_(step / 100 * noise(name, *value.shape))
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        model.save_pretrained(folder)
        edit_json(folder / "adapter_config.json", fan_in_fan_out=False)
    model.merge_and_unload().save_pretrained(tmp_path / "merged-20")
    return tmp_path


def written(run: Path, jump: dict[str, LowRankUpdate], backbone: str = "base") -> dict[str, Tensor]:
    source = open_checkpoints(run / "checkpoints", backbone=run / backbone)
    make_applier("merged-model").apply(Prediction(source, 20, 10, updates=jump), out=run / "out")
    return load_file(run / "out" / MODEL)


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], None])
@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["names of the Hub", "names of transformers"])
def test_an_adapter_is_merged_as_peft_merges_it_plus_the_transposed_jump(
    run: Path, prefix: str, architectures: list[str] | None
) -> None:
    edit_json(run / "base" / "config.json", architectures=architectures)
    if prefix == "":  # the Hub's gpt2 was saved without its head, and so without this prefix
        base = load_file(run / "base" / MODEL)
        names = {name: name.removeprefix("transformer.") for name in base}
        save_file({names[name]: value for name, value in base.items()}, run / "base" / MODEL, metadata={"format": "pt"})
    jump = LowRank(noise("left", 16, 1), noise("right", 1, 16))
    found = written(run, {f"{SQUARE}.weight": LowRankUpdate(jump)})
    expected = load_file(run / "merged-20" / MODEL)
    expected[f"{SQUARE}.weight"] += jump.dense().T
    assert len(found) == len(expected)
    for name, value in expected.items():
        key = name if prefix else name.removeprefix("transformer.")
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)


def test_a_flag_does_not_transpose_a_linear_layer(own_lora_run: LoraRun, tmp_path: Path) -> None:
    edit_json(own_lora_run.folder(60) / "adapter_config.json", fan_in_fan_out=True)
    source = open_checkpoints(own_lora_run.path, own_lora_run.base)
    make_applier("merged-model").apply(Prediction(source, 60, 10), out=tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = load_file(tmp_path / "out" / MODEL)[name] - load_file(own_lora_run.base / MODEL)[name]
    torch.testing.assert_close(moved.double(), own_lora_run.deltas[60][name], atol=1e-5, rtol=0)


def test_a_model_that_transformers_cannot_build_is_refused(run: Path) -> None:
    edit_json(run / "base" / "config.json", architectures=["OfNobody"])
    source = open_checkpoints(run / "checkpoints")
    with raises_kind("checkpoint-unsupported-adapter", "transposed"):
        make_applier("merged-model", backbone=run / "base").check_source(source, run / "out")

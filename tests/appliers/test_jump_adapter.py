"""Displacements as an adapter of their own: PEFT loads it, and it acts as exactly these weight_deltas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core.appliers.jump_adapter import adapter_settings, adapter_tensors, balanced
from next_core.mathematics.low_rank import LowRank
from tests.conftest import noise

LAYER = "model.layers.{}.{}.weight"
SHAPES = {  # of the small base model
    LAYER.format(0, "self_attn.q_proj"): (16, 16),
    LAYER.format(1, "self_attn.q_proj"): (16, 16),
    LAYER.format(0, "mlp.down_proj"): (16, 24),
    LAYER.format(1, "mlp.up_proj"): (24, 16),
}
RANKS = dict(zip(SHAPES, (3, 1, 3, 2), strict=True))


def low_rank(name: str, rank: int) -> LowRank:
    rows, columns = SHAPES[name]
    left, right = noise(name + "left", rows, rank), noise(name + "right", rank, columns)
    return LowRank(0.3 * left.double(), 0.3 * right.double())


@pytest.fixture
def moves() -> dict[str, LowRank]:
    """Ranks differ; one weight_delta is of rank zero."""
    found = {name: low_rank(name, rank) for name, rank in RANKS.items()}
    return found | {LAYER.format(0, "mlp.up_proj"): LowRank.zero(24, 16)}


def write(folder: Path, moves: dict[str, LowRank]) -> Path:
    folder.mkdir()
    settings = adapter_settings(moves) | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(adapter_tensors(moves), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_b_a_is_the_displacement(scale: float) -> None:
    move = low_rank(LAYER.format(0, "mlp.down_proj"), 3)
    A, B = balanced(LowRank(move.left * scale, move.right))
    assert (tuple(A.shape), tuple(B.shape)) == ((3, 24), (16, 3))
    torch.testing.assert_close(B @ A, move.dense() * scale, rtol=1e-12, atol=0)


def test_both_factors_carry_the_root_of_the_norm() -> None:
    move = low_rank(LAYER.format(0, "mlp.down_proj"), 3)
    A, B = balanced(LowRank(move.left * 1e-7, move.right * 1e3))
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-12, atol=0)


def test_a_displacement_whose_factors_under_or_overflow_in_fp32_does_not(tmp_path: Path) -> None:
    name = LAYER.format(0, "mlp.down_proj")
    move = low_rank(name, 2)
    stored = adapter_tensors({name: LowRank(move.left * 1e-42, move.right * 1e42)})
    A, B = (stored[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(B.double() @ A.double(), move.dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("zero", ["left", "right", "both"])
def test_columns_of_zeros_stay_zeros(zero: str) -> None:
    move = low_rank(LAYER.format(0, "mlp.down_proj"), 3)
    left, right = move.left.clone(), move.right.clone()
    if zero != "right":
        left[:, 1] = 0
    if zero != "left":
        right[1] = 0
    A, B = balanced(LowRank(left, right))
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    torch.testing.assert_close(B @ A, left @ right, rtol=1e-12, atol=1e-15)


def test_a_displacement_of_rank_zero_is_left_out(moves: dict[str, LowRank]) -> None:
    settings, tensors = adapter_settings(moves), adapter_tensors(moves)
    assert len(settings["target_modules"]) == len(SHAPES)
    assert not [key for key in tensors if "layers.0.mlp.up_proj" in key]
    assert len(tensors) == 2 * len(SHAPES)
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_peft_takes_the_settings_and_scales_by_one(moves: dict[str, LowRank]) -> None:
    from peft import LoraConfig

    settings = adapter_settings(moves)
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    assert config.r == config.lora_alpha == 3
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert set(settings["rank_pattern"].values()) == {1, 2}


def test_it_loads_in_peft_and_acts_as_the_displacements(
    base: Path, moves: dict[str, LowRank], tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "adapter", moves)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    layers = {
        name: layer
        for name, layer in model.base_model.model.named_modules()
        if "default" in getattr(layer, "lora_A", {})
    }
    assert {f"{name}.weight": layer.r["default"] for name, layer in layers.items()} == RANKS
    for name, layer in layers.items():
        assert layer.scaling["default"] == 1.0
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), moves[f"{name}.weight"].dense(), rtol=1e-5, atol=1e-6
        )

    moved = AutoModelForCausalLM.from_pretrained(base).double()
    with torch.no_grad():
        for name, move in moves.items():
            moved.get_parameter(name).add_(move.dense())
    said = logits(model)
    torch.testing.assert_close(said, logits(moved), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)


def test_layers_whose_numbers_begin_alike_keep_their_own_ranks(tmp_path: Path) -> None:
    """PEFT takes the keys of its patterns for regular expressions."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12, "vocab_size": 8}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1))
    ranks = {LAYER.format(number, "mlp.up_proj"): 1 + number % 3 for number in range(12)}
    moves = {name: LowRank(torch.ones(8, rank), torch.ones(rank, 8)) for name, rank in ranks.items()}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter_settings(moves)))
    made = {n: m for n, m in adapted.base_model.model.named_modules() if "default" in getattr(m, "lora_A", {})}
    assert {f"{name}.weight": layer.r["default"] for name, layer in made.items()} == ranks


def test_the_written_tensors_are_contiguous_and_by_pefts_names(moves: dict[str, LowRank], tmp_path: Path) -> None:
    stored = load_file(write(tmp_path / "adapter", moves) / "adapter_model.safetensors")
    module = LAYER.format(1, "self_attn.q_proj").removesuffix(".weight")
    assert stored[f"base_model.model.{module}.lora_A.weight"].shape == (1, 16)
    assert stored[f"base_model.model.{module}.lora_B.weight"].shape == (16, 1)

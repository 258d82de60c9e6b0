"""Weight deltas as an adapter of their own: PEFT loads it, and it acts as exactly these deltas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core.appliers.jump_adapter import adapter_settings, adapter_tensors, balanced
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_tensors import factor_keys
from tests.conftest import noise

LAYER = "model.layers.{}.{}.weight"
DOWN = LAYER.format(0, "mlp.down_proj")
SHAPES = {  # of the small base model
    LAYER.format(0, "self_attn.q_proj"): (16, 16),
    LAYER.format(1, "self_attn.q_proj"): (16, 16),
    DOWN: (16, 24),
    LAYER.format(1, "mlp.up_proj"): (24, 16),
}
RANKS = dict(zip(SHAPES, (3, 1, 3, 2), strict=True))


def low_rank(name: str, rank: int) -> LowRank:
    rows, columns = SHAPES[name]
    left, right = noise(name + "left", rows, rank), noise(name + "right", rank, columns)
    return LowRank(0.3 * left.double(), 0.3 * right.double())


@pytest.fixture
def deltas() -> dict[str, LowRank]:
    """Ranks differ; one delta is of rank zero."""
    found = {name: low_rank(name, rank) for name, rank in RANKS.items()}
    return found | {LAYER.format(0, "mlp.up_proj"): LowRank.zero(24, 16)}


@pytest.mark.parametrize(("left", "right"), [(1.0, 1.0), (1e-7, 1e3), (1e5, 1e-6)])
def test_b_a_is_the_delta_and_both_carry_the_root_of_its_norm(left: float, right: float) -> None:
    delta = low_rank(DOWN, 3)
    A, B = balanced(LowRank(delta.left * left, delta.right * right))
    assert (tuple(A.shape), tuple(B.shape)) == ((3, 24), (16, 3))
    torch.testing.assert_close(B @ A, delta.dense() * left * right, rtol=1e-12, atol=0)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-12, atol=0)


def test_a_delta_whose_factors_under_or_overflow_in_fp32_does_not() -> None:
    delta = low_rank(DOWN, 2)
    stored = adapter_tensors({DOWN: LowRank(delta.left * 1e-42, delta.right * 1e42)})
    A, B = (stored[key].double() for key in factor_keys(DOWN.removesuffix(".weight")))
    torch.testing.assert_close(B @ A, delta.dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("zero", [("left",), ("right",), ("left", "right")])
def test_columns_of_zeros_stay_zeros(zero: tuple[str, ...]) -> None:
    delta = low_rank(DOWN, 3)
    left, right = delta.left.clone(), delta.right.clone()
    if "left" in zero:
        left[:, 1] = 0
    if "right" in zero:
        right[1] = 0
    A, B = balanced(LowRank(left, right))
    assert bool(torch.isfinite(A).all() and torch.isfinite(B).all())
    torch.testing.assert_close(B @ A, left @ right, rtol=1e-12, atol=1e-15)


def test_it_acts_as_the_deltas_in_peft(
    base: Path, deltas: dict[str, LowRank], tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = adapter_settings(deltas) | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(adapter_tensors(deltas), tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    named = model.base_model.model.named_modules()
    layers = {f"{name}.weight": m for name, m in named if "default" in getattr(m, "lora_A", {})}
    assert {name: layer.r["default"] for name, layer in layers.items()} == RANKS
    moved = AutoModelForCausalLM.from_pretrained(base).double()
    for name, layer in layers.items():
        assert layer.scaling["default"] == 1.0
        delta = layer.get_delta_weight("default").double()
        torch.testing.assert_close(delta, deltas[name].dense(), rtol=1e-5, atol=1e-6)
        moved.get_parameter(name).data.add_(deltas[name].dense())
    found = logits(model)
    torch.testing.assert_close(found, logits(moved), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)


def test_layers_whose_numbers_begin_alike_keep_their_own_ranks() -> None:
    """PEFT reads the keys of its patterns as regular expressions."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12, "vocab_size": 8}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1))
    ranks = {LAYER.format(number, "mlp.up_proj"): 1 + number % 3 for number in range(12)}
    deltas = {name: LowRank(torch.ones(8, rank), torch.ones(rank, 8)) for name, rank in ranks.items()}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter_settings(deltas)))
    made = {n: m for n, m in adapted.base_model.model.named_modules() if "default" in getattr(m, "lora_A", {})}
    assert {f"{name}.weight": layer.r["default"] for name, layer in made.items()} == ranks

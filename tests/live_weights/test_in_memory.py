"""Jumps in a live model: refused with a kind where they would do harm, and undone when they fail half-way.

What an applied jump must do is in the conformance checks, which run on this applier too.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from next_core import open_checkpoints
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.live_weights import frozen_adapters
from next_core.live_weights.frozen_adapters import activate_jumps, jump_adapters, rehearse_adapter
from next_core.live_weights.in_memory import InMemoryApplier
from next_core.mathematics.low_rank import LowRank
from next_core.sources.memory import MemorySource
from tests.conftest import LoraRun, noise
from tests.errors import raises_kind
from tests.fuzz.adapters import Draw, base_model, write_run

MOE = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TIED = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
"""PEFT trains one tensor as a factor of the head and of the embedding."""
ROW, LAST = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(lora_run: LoraRun) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(lora_run.base)
    return PeftModel.from_pretrained(base, lora_run.folder(60), is_trainable=True)


def low_rank(name: str = ROW) -> dict[str, LowRankUpdate]:
    return {name: LowRankUpdate(LowRank(noise("l", 16, 1), noise("r", 1, 16)))}


def predict(run: LoraRun, updates: Any) -> Prediction:
    return Prediction(open_checkpoints(run.path), 60, 10, updates=updates)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_jump_adapters_are_numbered_frozen_and_removed_by_rolling_back(model: Any, lora_run: LoraRun) -> None:
    before = weights(model)
    jumps = [InMemoryApplier().apply(predict(lora_run, low_rank()), out=model) for _ in range(11)]
    assert jump_adapters(model) == [f"jump-{number}" for number in range(1, 12)]
    model.base_model.set_adapter("default")
    assert activate_jumps(model) == jump_adapters(model)
    assert not [name for name, _ in model.named_parameters() if "jump-" in name]
    for jump in reversed(jumps):
        jump.rollback()
    assert model.base_model.active_adapters == ["default"]
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_error_half_way_undoes_the_parameters_before_it(model: Any, lora_run: LoraRun) -> None:
    before = weights(model)
    updates = {ROW: CoefficientUpdate({60: 1.0, 50: -1.0}, "factors"), **low_rank(LAST)}
    model.peft_config["ref"] = model.peft_config["default"]
    with raises_kind("backend-unsupported", "'ref'", "factors"):
        InMemoryApplier().apply(predict(lora_run, updates), out=model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_half_made_adapter_is_removed(model: Any, lora_run: LoraRun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(model)
    halves = iter([frozen_adapters.balanced(low_rank()[ROW].matrix)])
    monkeypatch.setattr(frozen_adapters, "balanced", lambda delta: next(halves))
    with pytest.raises(StopIteration):
        InMemoryApplier().apply(predict(lora_run, {**low_rank(), **low_rank(LAST)}), out=model)
    assert model.base_model.active_adapters == ["default"]
    assert weights(model).keys() == before.keys()


def test_the_checkpoints_of_another_model_are_refused(model: Any, lora_run: LoraRun) -> None:
    prediction = predict(lora_run, {ROW: CoefficientUpdate({60: 1.0, 50: -1.0}, "factors")})
    model.get_submodule("base_model.model.model.layers.0.self_attn").q_proj = nn.Linear(16, 16)
    with raises_kind("checkpoint-other-model", "layers.0.self_attn.q_proj.lora_A.default.weight", "missing"):
        InMemoryApplier().apply(prediction, out=model)


@pytest.mark.parametrize("active", [[], ["default", "second"]])
def test_exactly_one_adapter_must_train(model: Any, lora_run: LoraRun, active: list[str]) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(active)
    with raises_kind("backend-unsupported", "adapters"):
        InMemoryApplier().apply(predict(lora_run, low_rank()), out=model)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [((4, 6), torch.bfloat16, "backend-unsupported"), ((6, 4), torch.float32, "checkpoint-other-model")],
)
def test_weights_of_another_precision_or_shape_are_refused(
    shape: tuple[int, int], dtype: torch.dtype, kind: str
) -> None:
    source = MemorySource(
        {step: {"weight": noise(f"{step}", 4, 6)} for step in (10, 20)}, {"weight": torch.zeros(4, 6)}
    )
    prediction = Prediction(source, 20, 10, updates={"weight": CoefficientUpdate({20: 1.0, 10: -1.0})})
    live = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    with raises_kind(kind, "'weight'"):
        InMemoryApplier().apply(prediction, out=live)
    assert live.weight.dtype is dtype


def test_a_dense_jump_cannot_become_an_adapter(model: Any) -> None:
    weights = {step: {ROW: noise(f"{step}", 16, 16)} for step in (10, 20)}
    source = MemorySource(weights, {ROW: torch.zeros(16, 16)})
    prediction = Prediction(source, 20, 10, updates={ROW: CoefficientUpdate({20: 1.0, 10: -1.0})})
    with raises_kind("backend-unsupported", ROW):
        InMemoryApplier().apply(prediction, out=model)


def continued(base: str, lora: dict[str, Any], folder: Path) -> Any:
    """A run in ``folder``, continued from step 20."""
    from peft import PeftModel

    write_run(Draw(5, base, lora, "default", 1.0, start=False), base_model(base, folder), folder / "run")
    model = copy.deepcopy(base_model(base, folder))
    return PeftModel.from_pretrained(model, folder / "run/checkpoint-20", is_trainable=True)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("base", "lora"), [("moe", MOE), ("qwen2 tied", TIED)])
def test_a_factor_jump_moves_experts_and_shared_factors_as_in_the_files_and_is_undone(
    tmp_path: Path, base: str, lora: dict[str, Any]
) -> None:
    model = continued(base, lora, tmp_path)
    before = weights(model)
    source = open_checkpoints(tmp_path / "run")
    moves = {p.name: CoefficientUpdate({20: 1.0, 10: -1.0}, "factors") for p in source.parameters}
    applied = InMemoryApplier().apply(Prediction(source, 20, 10, updates=moves), 2.0, out=model)
    files = [load_file(tmp_path / f"run/checkpoint-{step}/adapter_model.safetensors") for step in (10, 20)]
    after = weights(model)
    factors = [key for key in files[1] if ".lora_" in key]
    for key in factors:
        moved = after[key.removesuffix(".weight") + ".default" + ".weight" * key.endswith(".weight")]
        torch.testing.assert_close(moved, 3 * files[1][key] - 2 * files[0][key], atol=1e-6, rtol=1e-6)
    if base == "moe":
        assert set(applied.shift) == {f"{key[17:-14]}.weight.{key[-13:-7]}" for key in factors}
    applied.rollback()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_jumps_in_merged_space_are_tried_on_a_model_before_it_trains(model: Any, tmp_path: Path) -> None:
    before, states = weights(model), torch.get_rng_state()
    rehearse_adapter(model)
    assert model.base_model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    assert torch.equal(torch.get_rng_state(), states)
    assert weights(model).keys() == before.keys()
    with raises_kind("backend-unsupported", "experts", "space: factors"):
        rehearse_adapter(continued("moe", MOE, tmp_path))
    model.peft_config["ref"] = model.peft_config["default"]
    with raises_kind("backend-unsupported", "'ref'", "space: factors"):
        rehearse_adapter(model)

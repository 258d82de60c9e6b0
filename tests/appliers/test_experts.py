"""Mixtures of experts: transformers stores the experts of a layer one by one or as a stack, and each one moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from next_core import History, make_applier, make_predictor, open_checkpoints
from next_core.interfaces import LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from tests.conftest import noise
from tests.errors import raises_kind
from tests.sources.models import SMALL, StraightRun, built, straight_run

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 8}
DEEPSEEK = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS | {"moe_intermediate_size": 8}),
    "deepseek": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK | {"moe_intermediate_size": 8}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", EXPERTS | {"num_local_experts": 4}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {"num_local_experts": 4, "kv_channels": 8}),
}
ONE_BY_ONE, STACKED = {"save_original_format": True}, {"save_original_format": False}
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def model(name: str) -> Any:
    architecture, config, sizes = MODELS[name]
    return built(architecture, config, **SMALL | sizes)


def secant(run: StraightRun) -> Prediction:
    source = open_checkpoints(run.path, backbone=run.base)
    return make_predictor("secant", window=10).fit(History(source)).predict(10)


@pytest.fixture
def stacked(tmp_path: Path) -> StraightRun:
    return straight_run(tmp_path, model("qwen3-moe"), **STACKED)


@pytest.mark.parametrize("layout", [ONE_BY_ONE, STACKED], ids=["one by one", "stacked"])
@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_extrapolated_as_transformers_loads_it(name: str, layout: Any, tmp_path: Path) -> None:
    of_kind = model(name)
    run = straight_run(tmp_path, of_kind, **layout)
    prediction = secant(run)
    make_applier("merged-model").apply(prediction, out=tmp_path / "out")
    assert run.differing(tmp_path / "out", of_kind, step=30) == []
    stored = {value.data_ptr(): value for value in of_kind.state_dict().values()}  # JetMoe's head is its embedding
    sizes = [(value.numel(), value.dim()) for value in stored.values()]  # with DeepSeek's buffer
    share = sum(size for size, dimensions in sizes if dimensions > 1) / sum(size for size, _ in sizes)
    assert prediction.moved_share == pytest.approx(share)


def test_each_expert_of_a_stack_is_a_matrix_of_its_own(stacked: StraightRun, tmp_path: Path) -> None:
    source = open_checkpoints(stacked.path, backbone=stacked.base)
    shapes = {parameter.name: parameter.shape for parameter in source.parameters}
    assert [shapes[f"{STACK}[{expert}]"] for expert in range(4)] == [(16, 16)] * 4
    assert STACK not in shapes
    triplets = History(source).components("global")[f"{STACK}[2]"]
    expected = torch.linalg.svdvals(stacked.velocity[STACK][2].double())[0]
    torch.testing.assert_close(
        triplets.S[:, 0].double(), expected * torch.tensor([1.0, 2.0]).double(), rtol=1e-4, atol=0
    )
    jump = LowRankUpdate(LowRank(noise("left", 16, 1), noise("right", 1, 16)))
    make_applier("merged-model").apply(Prediction(source, 20, 10, updates={f"{STACK}[2]": jump}), out=tmp_path / "out")
    written = dict(model("qwen3-moe").from_pretrained(tmp_path / "out").named_parameters())
    wanted = stacked.at(20)[STACK]
    wanted[2] += jump.matrix.dense()
    torch.testing.assert_close(written[STACK], wanted)


def test_a_kernel_over_time_is_no_stack(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 32}
    mamba = built("MambaForCausalLM", "MambaConfig", **sizes)
    run = straight_run(tmp_path, mamba)
    make_applier("merged-model").apply(secant(run), out=tmp_path / "out")
    assert run.differing(tmp_path / "out", mamba, 30, unmoved=["backbone.layers.0.mixer.conv1d.weight"]) == []


def test_experts_that_the_backbone_alone_stores_as_a_stack_are_refused(tmp_path: Path) -> None:
    run = straight_run(tmp_path, model("qwen3-moe"), base=STACKED, **ONE_BY_ONE)
    with raises_kind("checkpoint-other-names", "experts", run.base):
        open_checkpoints(run.path, backbone=run.base)

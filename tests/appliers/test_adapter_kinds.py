"""Every kind of PEFT adapter is written so that plain PEFT loads it as a model built by hand, or it is refused."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from next_core import make_applier, make_predictor, open_checkpoints
from next_core.history.history import History
from tests.fuzz.adapters import Draw, base_model, check, fuzz, write_run

pytestmark = pytest.mark.filterwarnings("ignore")
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "fused experts, patterns": (
        "moe",
        {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"down_proj": 3}, "use_rslora": True},
    ),
    "a transposed parameter": ("gpt2", {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]}),
    "a shared parameter": ("qwen2 tied", {"target_parameters": ["embed_tokens.weight"]}),
    "bias of B": ("qwen2", {"lora_bias": True, "alpha_pattern": {"up_proj": 3}}),
    "trained biases": ("qwen2", {"bias": "lora_only"}),
    "embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3}}),
    "tied embedding": ("qwen2 tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied whole modules": ("qwen2 tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "token indices": ("qwen2", {"trainable_token_indices": [1, 3]}),
    "transposed layers": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 3}}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the base models of this file are saved."""
    return tmp_path_factory.mktemp("kinds")


@pytest.mark.parametrize("adapter", ["default", "policy"])
@pytest.mark.parametrize("kind", CASES)
def test_plain_peft_loads_each_kind_as_the_model_built_by_hand(models: Path, kind: str, adapter: str) -> None:
    model, lora = CASES[kind]
    outcomes = check(Draw(7, model, LORA | lora, adapter, 1.5, start=False), models)
    assert {key: outcome for key, outcome in outcomes.items() if "peft-adapter" in key} == {
        "factors peft-adapter": "exact",
        "merged peft-adapter": "exact",
    }
    refused = {"exact", "checkpoint-unsupported-adapter"}
    assert {outcome for key, outcome in outcomes.items() if "merged-model" in key} <= refused


def test_an_adapter_that_acts_after_certain_tokens_is_not_merged(models: Path) -> None:
    outcomes = check(Draw(7, "qwen2", LORA | {"alora_invocation_tokens": [1]}, "default", 1.0, start=False), models)
    assert outcomes["factors merged-model"] == outcomes["merged merged-model"] == "checkpoint-unsupported-adapter"


def test_both_entries_of_a_tied_embedding_are_written_alike(models: Path, tmp_path: Path) -> None:
    model, lora = CASES["tied embedding"]
    write_run(Draw(7, model, LORA | lora, "default", 1.0, start=False), base_model(model, models), tmp_path / "run")
    for space in ("factors", "merged"):
        history = History(open_checkpoints(tmp_path / "run"))
        prediction = make_predictor("secant", space=space).fit(history).predict(10)
        make_applier("peft-adapter").apply(prediction, out=tmp_path / space)
        wrote = load_file(tmp_path / space / "adapter_model.safetensors")
        head, table = "base_model.model.lm_head.lora_{}.weight", "base_model.model.model.embed_tokens.lora_embedding_{}"
        assert torch.equal(wrote[head.format("A")], wrote[table.format("B")].T)
        assert torch.equal(wrote[head.format("B")], wrote[table.format("A")].T)
        before = load_file(tmp_path / "run/checkpoint-20/adapter_model.safetensors")
        assert not torch.equal(wrote[table.format("A")], before[table.format("A")])


class Net(nn.Module):
    """A convolution, and two layers of which one's name is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.proj = nn.Linear(4, 4)
        self.inner = nn.Sequential(OrderedDict(proj=nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.proj(self.conv(x).mean((-1, -2))).tanh())
        return out


@pytest.mark.parametrize("patterns", [{"^proj": 2}, {"^proj": 2, "conv": 1, "inner.proj": 5}, {}])
def test_convolutions_and_names_that_end_alike_keep_their_own_ranks(tmp_path: Path, patterns: dict[str, int]) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    base = Net()
    lora = {"r": 4, "lora_alpha": 6, "target_modules": ["conv", "proj"], "rank_pattern": patterns}
    model: Any = get_peft_model(copy.deepcopy(base), LoraConfig(**lora))
    lines = [(p, torch.randn_like(p) / 4, torch.randn_like(p) / 100) for p in model.parameters() if p.requires_grad]
    for step in (10, 20):
        for parameter, at, along in lines:
            parameter.data = at + step * along
        model.save_pretrained(tmp_path / f"run/checkpoint-{step}")
    prediction = make_predictor("secant", space="merged").fit(History(open_checkpoints(tmp_path / "run"))).predict(10)
    make_applier("peft-adapter").apply(prediction, 2.0, out=tmp_path / "out")
    before, now = (PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"run/checkpoint-{s}") for s in (10, 20))
    for name in ("proj", "inner.proj"):
        deltas = [m.base_model.model.get_submodule(name).get_delta_weight("default") for m in (before, now)]
        now.base_model.model.get_submodule(name).base_layer.weight.data += 2.0 * (deltas[1] - deltas[0])
    x = torch.randn(3, 2, 5, 5)
    wrote = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(wrote(x), now(x), atol=1e-6, rtol=1e-5)
        assert not torch.allclose(wrote(x), before(x), atol=1e-3)


def test_random_configs_are_exact_or_refused(models: Path) -> None:
    outcomes = fuzz(models, range(20))
    assert outcomes["exact"] > outcomes.total() / 2
    assert set(outcomes) <= {"exact", "checkpoint-unsupported-adapter", "PEFT: ValueError"}

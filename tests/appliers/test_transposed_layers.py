"""GPT-2's layers store (in, out): what PEFT's product is added to depends on the class of a module, not on a flag."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import make_applier, open_checkpoints
from next_core.interfaces import LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from tests.conftest import LoraRun, noise
from tests.errors import raises_kind
from tests.fuzz.adapters import NAMES, STEPS, Draw, base_model, write_run
from tests.sources.models import edit_json

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
SQUARE = "transformer.h.0.attn.c_proj.weight"
MODEL = "model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """LoRA checkpoints of all layers of the model in ``gpt2``, whose configs do not say that these are transposed."""
    case = Draw(7, "gpt2", {"r": 2, "target_modules": NAMES["gpt2"]}, "default", 1.0, start=False)
    write_run(case, base_model("gpt2", tmp_path), tmp_path / "run")
    for step in STEPS:
        edit_json(tmp_path / f"run/checkpoint-{step}/adapter_config.json", fan_in_fan_out=False)
    return tmp_path


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], None])
@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["names of the Hub", "names of transformers"])
def test_an_adapter_is_merged_with_the_transposed_jump(run: Path, prefix: str, architectures: list[str] | None) -> None:
    from peft import PeftModel

    edit_json(run / "gpt2" / "config.json", architectures=architectures)
    # The Hub's gpt2 was saved without its head, and so without this prefix.
    base = {prefix + key.removeprefix("transformer."): x for key, x in load_file(run / "gpt2" / MODEL).items()}
    save_file(base, run / "gpt2" / MODEL, metadata={"format": "pt"})
    jump = LowRank(noise("left", 8, 1), noise("right", 1, 8))
    source = open_checkpoints(run / "run", backbone=run / "gpt2")
    updates = {SQUARE: LowRankUpdate(jump)}
    make_applier("merged-model").apply(Prediction(source, 20, 10, updates=updates), out=run / "out")
    found = load_file(run / "out" / MODEL)
    trained = PeftModel.from_pretrained(copy.deepcopy(base_model("gpt2", run)), run / "run/checkpoint-20")
    expected = trained.merge_and_unload().state_dict()
    expected[SQUARE] += jump.dense().T
    assert found.keys() == base.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected["transformer." + name.removeprefix("transformer.")])


def test_a_flag_does_not_transpose_a_linear_layer(own_lora_run: LoraRun, tmp_path: Path) -> None:
    edit_json(own_lora_run.folder(60) / "adapter_config.json", fan_in_fan_out=True)
    source = open_checkpoints(own_lora_run.path, own_lora_run.base)
    make_applier("merged-model").apply(Prediction(source, 60, 10), out=tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = load_file(tmp_path / "out" / MODEL)[name] - load_file(own_lora_run.base / MODEL)[name]
    torch.testing.assert_close(moved.double(), own_lora_run.deltas[60][name], atol=1e-5, rtol=0)


def test_a_model_that_transformers_cannot_build_is_refused(run: Path) -> None:
    edit_json(run / "gpt2" / "config.json", architectures=["OfNobody"])
    source = open_checkpoints(run / "run")
    with raises_kind("checkpoint-unsupported-adapter", "transposed"):
        make_applier("merged-model", backbone=run / "gpt2").check_source(source, run / "out")

"""Checkpoints that the real OpenRLHF 0.11.2 wrote (tests/backends/openrlhf/cpu/record.py), read and extended."""

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core import make_applier, make_predictor, open_checkpoints
from next_core.history.history import History
from next_core.interfaces import CheckpointSource, Prediction
from next_core.mathematics.low_rank import dense
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.deepspeed import READER
from next_core.sources.full_model import FullModelSource
from tests.errors import raises_kind

RECORDED = Path(__file__).parent / "recorded" / "openrlhf"
BASE = RECORDED / "base"
SETS = ("lora-zero2", "lora-zero3", "full-zero2")
LORA = SETS[:2]
MODULES = (*(f"self_attn.{side}_proj" for side in "kqvo"), *(f"mlp.{part}_proj" for part in ("down", "gate", "up")))
LAYERS = {f"model.layers.0.{module}.weight" for module in MODULES}
NEW = 3


def opened(name: str, path: Path | list[Path] | None = None, **settings: Any) -> CheckpointSource:
    allowed = {"allow_pickle": True} if name == "lora-zero3" else {}
    return open_checkpoints(path or RECORDED / name, BASE, **{**allowed, **settings})


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A set that a test may damage."""
    return lambda name: Path(shutil.copytree(RECORDED / name, tmp_path / name))


def stored(name: str, step: int) -> dict[str, Tensor]:
    """What the files hold, read by nothing of ours."""
    folder = RECORDED / name / f"global_step{step}_hf"
    if (folder / "adapter_model.bin").exists():
        found: dict[str, Tensor] = torch.load(folder / "adapter_model.bin", weights_only=True)
        return found
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize(("name", "precision"), zip(SETS, (torch.bfloat16, torch.float32, torch.bfloat16), strict=True))
def test_the_layout_its_steps_and_the_precision_of_the_files_are_found(name: str, precision: torch.dtype) -> None:
    """OpenRLHF saves bf16; the pickles of adapters under ZeRO-3 are fp32, and no bf16 numbers in it."""
    source = opened(name)
    assert isinstance(source, FullModelSource if name == "full-zero2" else PeftAdapterSource)
    assert (source.steps, source.naming, list(source.notes)) == ((1, 2, 3), "global_stepN_hf", [])
    assert {source.precision(parameter.name) for parameter in source.parameters} == {precision}
    fine = any(not torch.equal(value.float(), value.bfloat16().float()) for value in stored(name, NEW).values())
    assert fine == (precision == torch.float32)


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_has_every_linear_layer_and_its_rank_factors_and_scaling(name: str) -> None:
    source = opened(name)
    assert {p.name: (p.shape, p.rank) for p in source.parameters} == dict.fromkeys(LAYERS, ((32, 32), 2))
    assert source.skipped == {}
    for step in source.steps:
        tensors = stored(name, step)
        for layer in LAYERS:
            factors = source.factors(layer, step)
            key = f"base_model.model.{layer.removesuffix('.weight')}.lora_{{}}.weight"
            assert torch.equal(factors.A, tensors[key.format("A")].float())
            assert torch.equal(factors.B, tensors[key.format("B")].float())
            assert factors.scaling == 2.0


@pytest.mark.parametrize("name", SETS)
def test_a_folder_without_the_tokenizer_is_incomplete(name: str, copied: Callable[[str], Path]) -> None:
    path = copied(name)
    (path / "global_step2_hf" / "tokenizer_config.json").unlink()
    with raises_kind("checkpoint-incomplete", "global_step2_hf"):
        opened(name, path)
    source = opened(name, path, skip_damaged=True)
    assert source.steps == (1, 3)
    assert any("global_step2_hf" in note for note in source.notes)


@pytest.mark.parametrize(
    "recorded",
    [True, pytest.param(False, marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"))],
)
def test_masters_replace_the_stored_weights(monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    masters = load_file(RECORDED / "lora-zero2" / "masters.safetensors")
    if recorded:  # what DeepSpeed's reader returned, instead of the reader
        module: Any = ModuleType(READER)
        module.get_fp32_state_dict_from_zero_checkpoint = lambda *_, **__: masters
        monkeypatch.setitem(sys.modules, READER, module)
    source = opened("lora-zero2", [RECORDED / "lora-zero2" / "global_step3_hf"], masters=True, allow_pickle=True)
    assert {source.precision(layer) for layer in LAYERS} == {torch.float32}
    for layer in LAYERS:
        found = source.factors(layer, NEW)
        key = f"base_model.model.{layer.removesuffix('.weight')}.lora_{{}}.default.weight"
        assert torch.equal(found.A, masters[key.format("A")])
        assert torch.equal(found.B, masters[key.format("B")])


def secant(name: str, **fields: Any) -> Prediction:
    history = History(opened(name))
    return make_predictor("secant", window=2, **fields).fit(history).predict(2)


@pytest.mark.parametrize("name", SETS)
def test_a_model_is_extended_and_transformers_loads_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    prediction = secant(name, space="merged")
    make_applier("merged-model").apply(prediction, out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = load_file(BASE / "model.safetensors")
    source = prediction.source
    moved = 0
    for parameter in source.parameters:
        layer = parameter.name
        wanted = base[layer].double() + dense(source.delta(layer, NEW)).double() * 2 - dense(source.delta(layer, 1))
        written = model.get_parameter(layer)
        assert written.dtype == torch.bfloat16
        torch.testing.assert_close(written.double(), wanted.double(), rtol=2**-7, atol=1e-6)
        moved += int(not torch.equal(written, base[layer]))
    assert moved == len(source.parameters)

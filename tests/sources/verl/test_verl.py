"""What verl 0.9.1's own manager saves in two processes is read exactly, and it loads what we write in its layout.

The oracle is the processes' memory: weights, Adam's moments and logits that torch gathered there.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from next_core import History, make_applier, make_predictor, open_checkpoints
from next_core.interfaces import CheckpointSource
from next_core.sources.adapter_source import PeftAdapterSource
from tests.backends.external.real import environment
from tests.backends.trl.launch import Launch
from tests.backends.verl.conftest import CPU
from tests.errors import raises_kind
from tests.sources.models import SMALL, built

pytestmark = pytest.mark.verl
HERE = Path(__file__).parent
FULL = ("fsdp2", "tied", "columns", "hybrid", "fsdp1")
LORA = ("lora", "lora_only", "fsdp1_lora")
EXPORTED = ("fsdp2", "tied", "lora")  # Those that verl also exports to huggingface/
STEPS = (10, 20, 30)
MODEL = SMALL | {"vocab_size": 33, "num_key_value_heads": 1, "num_hidden_layers": 2}


def start(out: Path, action: str) -> None:
    more = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "cpu_platform", "PYTHONPATH": str(CPU)}
    python = environment("verl") / "bin" / "python"
    run = Launch(out, action, HERE / "saver.py", [action, str(out)], torchrun=True, python=python, more=more)
    assert run.codes == [0], run.log


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, with the weights as the processes had them."""
    out = tmp_path_factory.mktemp("verl")
    for name in ("base", "tied_base"):
        model = built("Qwen2ForCausalLM", "Qwen2Config", **MODEL, tie_word_embeddings=name == "tied_base")
        model.save_pretrained(out / name)
    start(out, "save")
    return out


@pytest.fixture(scope="module")
def jumped(saved: Path) -> Path:
    """The same, with what verl loaded of a jump by as much as the last 20 steps."""
    for kind in (*FULL, *LORA):
        prediction = make_predictor("secant").fit(History(opened(saved, kind))).predict(horizon=20)
        make_applier("verl").apply(prediction, alpha=1.5, out=saved / f"{kind}-jumped")
    start(saved, "load")
    return saved


def base_of(out: Path, kind: str) -> Path:
    return out / ("tied_base" if kind == "tied" else "base")


def opened(out: Path, kind: str, allow_pickle: bool = True) -> CheckpointSource:
    base = None if kind in LORA else base_of(out, kind)
    return open_checkpoints(out / kind, base, allow_pickle=allow_pickle)


def truth(out: Path, kind: str, name: object) -> dict[str, Tensor]:
    return load_file(out / kind / f"truth-{name}.safetensors")


def weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != "logits" and not name.startswith("adam.")}


def adam(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith("adam.") and not name.endswith(".step")}


def lora_keys(parameter: str) -> tuple[str, str]:
    module = f"base_model.model.{parameter.removesuffix('.weight')}"
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


@pytest.mark.parametrize("kind", FULL)
def test_whole_models_are_read_as_the_processes_had_them(saved: Path, kind: str) -> None:
    if kind not in EXPORTED:
        with raises_kind("checkpoint-pickle", "model_world_size_2_rank_0.pt"):
            opened(saved, kind, allow_pickle=False)
    source = opened(saved, kind)
    assert (source.name, source.steps) == ("full-model", STEPS)
    for step in STEPS:
        expected, model = weights(truth(saved, kind, step)), source.model(step)
        assert set(model.shapes) == set(expected) - ({"lm_head.weight"} if kind == "tied" else set())
        for name in model.shapes:
            assert torch.equal(model.read(name), expected[name]), name


@pytest.mark.parametrize("kind", LORA)
def test_adapters_are_read_as_the_processes_had_them(saved: Path, kind: str) -> None:
    source = opened(saved, kind, allow_pickle=kind not in EXPORTED)
    assert (source.name, source.steps, len(source.parameters)) == ("peft-adapter", STEPS, 14)
    for step in STEPS:
        expected = truth(saved, kind, step)
        for parameter in source.parameters:
            factors = source.factors(parameter.name, step)
            assert factors is not None
            assert factors.scaling == 2.0
            for key, value in zip(lora_keys(parameter.name), (factors.A, factors.B), strict=True):
                assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("kind", EXPORTED)
def test_shards_are_read_as_the_exported_model(saved: Path, tmp_path: Path, kind: str) -> None:
    shards = Path(shutil.copytree(saved / kind, tmp_path / kind))
    for exported in shards.glob("global_step_*/actor/huggingface/model.safetensors"):
        exported.unlink()
    base = base_of(saved, kind)
    one, other = opened(saved, kind), open_checkpoints(shards, base, allow_pickle=True)
    assert one.parameters == other.parameters
    for parameter in one.parameters:
        deltas = [source.delta(parameter.name, 30, 10) for source in (one, other)]
        whole = [delta if isinstance(delta, Tensor) else delta.left @ delta.right for delta in deltas]
        assert torch.equal(*whole)


@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_written_for_peft_gives_verls_logits(saved: Path, tmp_path: Path, kind: str) -> None:
    source = opened(saved, kind)
    assert isinstance(source, PeftAdapterSource)
    prediction = make_predictor("secant").fit(History(source)).predict(horizon=20)
    make_applier("peft-adapter").apply(prediction, alpha=1e-12, out=tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(saved, kind)), tmp_path / "adapter")
    assert logits_differ(model, truth(saved, kind, 30)["logits"]) < 1e-5


def logits_differ(model: torch.nn.Module, expected: Tensor) -> float:
    ids = torch.randint(3, 30, (4, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((model(input_ids=ids).logits - expected).abs().max())


@pytest.mark.parametrize("kind", [*FULL, *LORA])
def test_verl_loads_the_jumped_weights_and_keeps_adams_state(jumped: Path, kind: str) -> None:
    first, last, loaded = (truth(jumped, kind, name) for name in (10, 30, "loaded"))
    expected = weights(last)
    for name, value in expected.items():
        moves = "lora_" in name if kind in LORA else value.dim() == 2
        expected[name] = value + 1.5 * (value - first[name]) if moves else value
    found = weights(loaded)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    assert adam(loaded)
    assert adam(loaded).keys() == adam(last).keys()
    assert all(torch.equal(value, adam(last)[name]) for name, value in adam(loaded).items())

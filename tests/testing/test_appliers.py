"""Every installed applier keeps the contract."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from next_core import make_applier, open_checkpoints, registry
from next_core.mathematics.low_rank import dense
from next_core.sources.fsdp_shards import open_shards
from next_core.testing import ApplierCase, Check, checks_of, dense_run, write_lora_run
from tests.conftest import STEPS, LoraRun
from tests.sources.fsdp import verl
from tests.testing.helpers import write_model_run

Make = Callable[[Path, LoraRun], ApplierCase]


def live_adapter(folder: Path, run: LoraRun) -> ApplierCase:
    """A PEFT model of a real run, at its newest checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def target() -> Any:
        model = AutoModelForCausalLM.from_pretrained(run.base)
        return PeftModel.from_pretrained(model, run.folder(STEPS[-1]), is_trainable=True)

    def read(model: Any) -> Mapping[str, Tensor]:
        active = model.base_model.active_adapters
        layers = {k: m for k, m in model.base_model.model.named_modules() if "default" in getattr(m, "lora_A", {})}
        return {
            f"{name}.weight": sum(layer.get_delta_weight(one) for one in active if one in layer.lora_A)
            for name, layer in layers.items()
        }

    return ApplierCase(make_applier("in-memory"), open_checkpoints(run.path), target, read)


class Whole(nn.Module):
    """A module all of whose weights train, under the names of a run."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.trained = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.trained.items()


def live_model(folder: Path, run: LoraRun) -> ApplierCase:
    source = dense_run()

    def read(model: Whole) -> Mapping[str, Tensor]:
        return {name: value.double() - source._backbone[name] for name, value in model.named_parameters()}

    newest = source.weights[source.steps[-1]]
    return ApplierCase(make_applier("in-memory"), source, lambda: Whole(newest), read)


def fresh(folder: Path) -> Callable[[], Path]:
    """Yield folders that do not exist."""
    numbers = itertools.count()
    return lambda: folder / f"out-{next(numbers)}" / "checkpoint-1"


def adapter_folder(folder: Path, run: LoraRun) -> ApplierCase:
    write_lora_run(folder / "checkpoints")

    def read(out: Path) -> Mapping[str, Tensor]:
        source = open_checkpoints(out.parent)
        return {p.name: dense(source.delta(p.name, 1)) for p in source.parameters}

    return ApplierCase(make_applier("peft-adapter"), open_checkpoints(folder / "checkpoints"), fresh(folder), read)


def merged(folder: Path) -> ApplierCase:
    base = load_file(folder / "base" / "model.safetensors")

    def read(out: Path) -> Mapping[str, Tensor]:
        return {name: value.double() - base[name] for name, value in load_file(out / "model.safetensors").items()}

    source = open_checkpoints(folder / "checkpoints", backbone=folder / "base")
    return ApplierCase(make_applier("merged-model"), source, fresh(folder), read)


def merged_adapters(folder: Path, run: LoraRun) -> ApplierCase:
    write_model_run(folder / "full")
    write_lora_run(folder / "checkpoints")
    return merged(folder)


def merged_models(folder: Path, run: LoraRun) -> ApplierCase:
    write_model_run(folder / "checkpoints")
    return merged(folder)


def verl_shards(folder: Path, run: LoraRun) -> ApplierCase:
    """A whole model that two processes of verl shard."""
    made = write_model_run(folder / "full")
    for step, weights in made.weights.items():
        verl(folder / "checkpoints", step, weights)
    base, last = load_file(folder / "base" / "model.safetensors"), made.steps[-1]

    def read(out: Path) -> Mapping[str, Tensor]:
        shards = open_shards(out / f"global_step_{last}" / "actor", allow_pickle=True)
        return {name: shards.read(name).double() - base[name] for name in shards.shapes}

    source = open_checkpoints(folder / "checkpoints", backbone=folder / "base", allow_pickle=True)
    return ApplierCase(make_applier("verl"), source, fresh(folder), read)


CASES: dict[str, tuple[str, Make]] = {
    "live, LoRA": ("in-memory", live_adapter),
    "live, full": ("in-memory", live_model),
    "peft-adapter": ("peft-adapter", adapter_folder),
    "merged-model, LoRA": ("merged-model", merged_adapters),
    "merged-model, full": ("merged-model", merged_models),
    "verl, full": ("verl", verl_shards),
}


@pytest.mark.parametrize("check", checks_of("applier").values(), ids=checks_of("applier"))
@pytest.mark.parametrize("case", CASES)
def test_an_installed_applier_keeps_the_contract(case: str, check: Check, tmp_path: Path, lora_run: LoraRun) -> None:
    check(CASES[case][1](tmp_path, lora_run))


def test_every_installed_applier_is_checked_on_some_run() -> None:
    assert set(registry().names("applier")) <= {applier for applier, _ in CASES.values()}

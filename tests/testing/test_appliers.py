"""Every applier that is installed with next-core keeps the contract, for each kind of run that it can write."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from next_core import make_applier, open_checkpoints, registry
from next_core.interfaces import CheckpointSource
from next_core.testing import (
    ApplierCase,
    Check,
    checks_of,
    dense_run,
    lora_run,
    write_base,
    write_lora_run,
    write_model_run,
)
from tests.conftest import STEPS, LoraRun

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


def live_model(folder: Path, run: LoraRun) -> ApplierCase:
    """All weights of a module."""
    source = dense_run()
    backbone = {k.removeprefix("backbone/"): v for k, v in source.tensors().items() if k.startswith("backbone/")}

    def target() -> nn.Module:
        model = nn.Module()
        for name, weight in source.weights[source.steps[-1]].items():
            *parents, last = name.split(".")
            module = model
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            assert isinstance(weight, Tensor)
            module.register_parameter(last, nn.Parameter(weight.clone()))
        return model

    def read(model: nn.Module) -> Mapping[str, Tensor]:
        return {name: value.double() - backbone[name] for name, value in model.named_parameters()}

    return ApplierCase(make_applier("in-memory"), source, target, read)


def fresh(folder: Path) -> Callable[[], Path]:
    """Folders that are not there yet."""
    numbers = itertools.count()
    return lambda: folder / f"out-{next(numbers)}" / "written"


def adapter_folder(folder: Path, run: LoraRun) -> ApplierCase:
    write_lora_run(folder / "checkpoints")

    def read(out: Path) -> Mapping[str, Tensor]:
        source = open_checkpoints(Path(write_as_checkpoint(out)))
        return {p.name: source.delta(p.name, 1).dense() for p in source.parameters}  # type: ignore[union-attr]

    return ApplierCase(make_applier("peft-adapter"), open_checkpoints(folder / "checkpoints"), fresh(folder), read)


def write_as_checkpoint(out: Path) -> Path:
    """A folder whose only checkpoint, of step 1, is what was written."""
    place = out.parent / "as-run"
    place.mkdir()
    (place / "checkpoint-1").symlink_to(out)
    return place


def merged(source: CheckpointSource, folder: Path) -> ApplierCase:
    base = load_file(folder / "base" / "model.safetensors")

    def read(out: Path) -> Mapping[str, Tensor]:
        return {name: value.double() - base[name] for name, value in load_file(out / "model.safetensors").items()}

    return ApplierCase(make_applier("merged-model"), source, fresh(folder), read)


def merged_adapters(folder: Path, run: LoraRun) -> ApplierCase:
    write_base(folder / "base")
    write_lora_run(folder / "checkpoints", lora_run())
    return merged(open_checkpoints(folder / "checkpoints", backbone=folder / "base"), folder)


def merged_models(folder: Path, run: LoraRun) -> ApplierCase:
    write_model_run(folder / "checkpoints")
    return merged(open_checkpoints(folder / "checkpoints", backbone=folder / "base"), folder)


CASES: dict[str, tuple[str, Make]] = {
    "live, LoRA": ("in-memory", live_adapter),
    "live, full": ("in-memory", live_model),
    "peft-adapter": ("peft-adapter", adapter_folder),
    "merged-model, LoRA": ("merged-model", merged_adapters),
    "merged-model, full": ("merged-model", merged_models),
}


@pytest.mark.parametrize("check", checks_of("applier").values(), ids=checks_of("applier"))
@pytest.mark.parametrize("case", CASES)
def test_it_keeps_the_contract(case: str, check: Check, tmp_path: Path, lora_run: LoraRun) -> None:
    check(CASES[case][1](tmp_path, lora_run))


def test_every_installed_applier_has_a_case_to_be_checked_on() -> None:
    assert set(registry().names("applier")) <= {applier for applier, _ in CASES.values()}


def test_the_kit_reads_what_is_live_without_gradients(tmp_path: Path, lora_run: LoraRun) -> None:
    with torch.enable_grad():
        case = live_adapter(tmp_path, lora_run)
        assert not any(value.requires_grad for value in case.after(case.prediction({})).values())

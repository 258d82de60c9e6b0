"""Every installed applier keeps the contract, and each check of appliers fails on an applier that breaks it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from next_core import make_applier, open_checkpoints, registry
from next_core.interfaces import CheckpointSource, Prediction
from next_core.live_weights.in_memory import InMemoryApplied, InMemoryApplier
from next_core.testing import (
    ApplierCase,
    Check,
    check_applier,
    checks_of,
    dense_run,
    lora_run,
    write_base,
    write_lora_run,
    write_model_run,
)
from next_core.testing.synthetic_runs import FROZEN
from tests.conftest import STEPS, LoraRun
from tests.testing.breaking import COMMON, fails

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
    """A module all of whose weights train."""
    source = dense_run()
    backbone = {name: value for name, value in source.tensors().items() if name.startswith("backbone/")}

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
        return {name: value.double() - backbone[f"backbone/{name}"] for name, value in model.named_parameters()}

    return ApplierCase(make_applier("in-memory"), source, target, read)


def fresh(folder: Path) -> Callable[[], Path]:
    """Yield folders that do not exist."""
    numbers = itertools.count()
    return lambda: folder / f"out-{next(numbers)}" / "written"


def adapter_folder(folder: Path, run: LoraRun) -> ApplierCase:
    write_lora_run(folder / "checkpoints")

    def read(out: Path) -> Mapping[str, Tensor]:
        source = open_checkpoints(write_as_checkpoint(out))
        return {p.name: source.delta(p.name, 1).dense() for p in source.parameters}  # type: ignore[union-attr]

    return ApplierCase(make_applier("peft-adapter"), open_checkpoints(folder / "checkpoints"), fresh(folder), read)


def write_as_checkpoint(out: Path) -> Path:
    """Return a folder whose only checkpoint, of step 1, is what was written."""
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
def test_an_installed_applier_keeps_the_contract(case: str, check: Check, tmp_path: Path, lora_run: LoraRun) -> None:
    check(CASES[case][1](tmp_path, lora_run))


def test_every_installed_applier_is_checked_on_some_run() -> None:
    assert set(registry().names("applier")) <= {applier for applier, _ in CASES.values()}


def test_positions_are_read_without_gradients(tmp_path: Path, lora_run: LoraRun) -> None:
    with torch.enable_grad():
        case = live_adapter(tmp_path, lora_run)
        assert not any(value.requires_grad for value in case.after(case.prediction({})).values())


def apply_that(
    prediction: Callable[[Prediction], Prediction] = lambda given: given,
    alpha: Callable[[float], float] = lambda given: given,
    also: Callable[[InMemoryApplied, Prediction, Any], object] = lambda applied, prediction, out: None,
) -> Any:
    """Return an ``apply`` that changes the prediction or alpha it is given, or does something more at the end."""

    def apply(self: Any, given: Prediction, strength: float = 1.0, *, out: Any) -> InMemoryApplied:
        applied = InMemoryApplier.apply(self, prediction(given), alpha(strength), out=out)
        also(applied, given, out)
        return applied

    return apply


def eager(refused: str) -> Any:
    """Return an ``apply`` that has written something already when it refuses an update for one reason."""

    def apply(self: Any, given: Prediction, strength: float = 1.0, *, out: Any) -> InMemoryApplied:
        try:
            return InMemoryApplier.apply(self, given, strength, out=out)
        except Exception as error:
            if refused in str(error):
                dict(out.named_parameters())[min(given.updates)].data.add_(1.0)
            raise

    return apply


def kind_doubled(space: str) -> Callable[[Prediction], Prediction]:
    """Return a change that doubles the coefficients of one space."""

    def double(update: Any) -> Any:
        if getattr(update, "space", None) != space:
            return update
        return dataclasses.replace(update, weights={step: 2 * weight for step, weight in update.weights.items()})

    return lambda given: dataclasses.replace(given, updates={name: double(u) for name, u in given.updates.items()})


def write(name: str, by: float) -> Callable[..., None]:
    """Return a step that also moves one parameter."""
    return lambda applied, given, out: (
        given.updates
        and applied.write(name, (at := dict(out.named_parameters())[name]), torch.full_like(at, by).double())
    )


def scribble(applied: Any, given: Prediction, out: Any) -> None:
    source: Any = given.source
    source.weights[given.step][min(given.updates)].add_(1.0)


def without_unknown(given: Prediction) -> Prediction:
    known = {parameter.name for parameter in given.source.parameters}
    return dataclasses.replace(given, updates={name: u for name, u in given.updates.items() if name in known})


WRONG: list[tuple[str, dict[str, Any]]] = [
    (
        "parameters_without_update_do_not_change",
        {"apply": apply_that(also=lambda applied, given, out: next(out.parameters()).data.add_(1.0))},
    ),
    ("moves_by_the_update", {"apply": apply_that(alpha=lambda given: given or 0.1)}),
    ("moves_by_the_update", {"apply": apply_that(kind_doubled("merged"))}),
    (
        "moves_by_the_update",
        {"apply": apply_that(lambda given: dataclasses.replace(given, anchor="newest"))},
    ),
    ("moves_by_the_update", {"apply": apply_that(kind_doubled("factors"))}),
    ("moves_by_the_update", {"apply": apply_that(alpha=lambda given: given * abs(given))}),
    (
        "moves_by_the_update",
        {"apply": apply_that(lambda given: dataclasses.replace(given, confidence={}))},
    ),
    ("parameters_without_update_do_not_change", {"apply": apply_that(also=write(FROZEN, 1e-6))}),
    (
        "rollback_restores_every_bit",
        {"apply": apply_that(also=lambda applied, given, out: applied.kept.pop())},
    ),
    ("bad_updates_change_nothing", {"apply": eager("is not finite")}),
    ("bad_updates_change_nothing", {"apply": eager("the update of")}),
    ("bad_updates_change_nothing", {"apply": eager("no parameter")}),
    ("bad_updates_change_nothing", {"apply": apply_that(without_unknown)}),
    ("changes_only_its_target", {"apply": apply_that(also=scribble)}),
    ("changes_only_its_target", {"apply": apply_that(also=lambda *_: torch.rand(1))}),
    ("changes_only_its_target", {"apply": lambda self, given, alpha=1.0, *, out: self.progress("apply", 3, 2)}),
]


def case(overrides: Mapping[str, Any]) -> ApplierCase:
    right = live_model(Path(), None)  # type: ignore[arg-type]
    return dataclasses.replace(right, plugin=type("Wrong", (InMemoryApplier,), dict(overrides))())


def test_what_is_right_passes() -> None:
    check_applier(case({}))


@pytest.mark.parametrize(("check", "overrides"), WRONG, ids=[check for check, _ in WRONG])
def test_a_check_fails_on_an_applier_that_breaks_it(check: str, overrides: Mapping[str, Any]) -> None:
    assert fails(check, "applier", case(overrides))


def test_every_check_has_an_applier_that_breaks_it() -> None:
    assert {name for name, _ in WRONG} | COMMON == set(checks_of("applier"))

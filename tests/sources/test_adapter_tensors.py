"""Names and config of an adapter: wrappers' names are stripped, variants of LoRA refused, every field is classified."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import make_applier, open_checkpoints
from next_core.interfaces import Prediction
from next_core.sources.adapter_config import IRRELEVANT, MEANINGFUL, VARIANTS
from next_core.sources.adapter_files import AdapterFiles
from tests.errors import raises_kind
from tests.sources.models import MODULE, adapter, adapter_tensors, edit_json

UNSUPPORTED = "checkpoint-unsupported-adapter"
KEY = f"base_model.model.{MODULE}.lora_A.weight"


def configured(folder: Path, **fields: Any) -> Path:
    """An adapter of rank 2 whose config has these fields."""
    edit_json(adapter(folder, 10) / "adapter_config.json", **fields)
    return folder


def renamed(folder: Path, **pairs: str) -> Path:
    """An adapter of rank 2 in whose names texts are replaced by others."""
    made, tensors = adapter(folder, 10), {}
    for key, value in adapter_tensors(10).items():
        for old, new in pairs.items():
            key = key.replace(old, new) if old != "start" else f"{new}{key}"
        tensors[key] = value
    save_file(tensors, made / "adapter_model.safetensors")
    return made


def test_every_field_of_the_installed_peft_is_classified() -> None:
    """A field that a new PEFT brings fails here: decide what it does to the delta."""
    from peft import LoraConfig

    classes = [set(VARIANTS), MEANINGFUL, IRRELEVANT]
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set.union(*map(set, classes))
    assert sum(map(len, classes)) == len(set.union(*map(set, classes)))


@pytest.mark.parametrize("field", [*VARIANTS, "use_newlora", "newlora_config"])
def test_a_variant_whose_delta_is_no_product_is_refused_if_set(tmp_path: Path, field: str) -> None:
    with raises_kind(UNSUPPORTED, field, "adapter_config.json"):
        AdapterFiles(configured(tmp_path / "set", **{field: {"a": 1}}))
    assert AdapterFiles(configured(tmp_path / "unset", **{field: None})).parameters


def test_what_other_tools_add_to_a_config_is_no_variant(tmp_path: Path) -> None:
    more = {"unsloth_fixed": True, "auto_mapping": {"a": "b"}, "eva_config": {"rho": 2.0}, "velora_config": {"a": 1}}
    assert AdapterFiles(configured(tmp_path / "a", **more)).scaling == {f"{MODULE}.weight": 1.0}


def test_tensors_of_an_unknown_variant_are_refused(tmp_path: Path) -> None:
    made, name = adapter(tmp_path / "a", 10), f"base_model.model.{MODULE}.lora_diag"
    save_file(adapter_tensors(10) | {name: torch.ones(2)}, made / "adapter_model.safetensors")
    with raises_kind(UNSUPPORTED, name):
        AdapterFiles(made)


@pytest.mark.parametrize("fields", [{"lora_alpha": 0}, {"alpha_pattern": {"q_proj": 0}}])
def test_an_adapter_scaled_by_zero_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with raises_kind(UNSUPPORTED, "lora_alpha", MODULE):
        AdapterFiles(configured(tmp_path / "a", **fields))


@pytest.mark.parametrize(
    "names",
    [
        {"start": "_orig_mod."},
        {"start": "module."},
        {"start": "module._orig_mod."},
        {"base_model.model.": "base_model.model._orig_mod."},
        {"layers.0.": "layers.0._checkpoint_wrapped_module."},
        {"start": "_fsdp_wrapped_module.", "layers.0.": "layers.0._fsdp_wrapped_module."},
        {".weight": ".default.weight"},
        {".weight": ".policy.weight", "start": "module."},
        {"base_model.model.": ""},
    ],
    ids=lambda names: " ".join(names.values()) or "bare",
)
def test_names_of_wrappers_are_stripped_in_what_is_read_and_written(tmp_path: Path, names: dict[str, str]) -> None:
    for step in (10, 20):
        renamed(tmp_path / f"run/checkpoint-{step}", **names)
    source = open_checkpoints(tmp_path / "run")
    assert [parameter.name for parameter in source.parameters] == [f"{MODULE}.weight"]
    assert torch.equal(source.delta(f"{MODULE}.weight", 20).dense(), torch.full((3, 4), 20.0).double())
    make_applier("peft-adapter").apply(Prediction(source, 20, 10), out=tmp_path / "out")
    assert set(load_file(tmp_path / "out/adapter_model.safetensors")) == set(adapter_tensors(10))


def test_an_adapter_without_a_linear_layer_is_refused(tmp_path: Path) -> None:
    made = renamed(tmp_path / "a", **{"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"})
    with raises_kind(UNSUPPORTED, MODULE, "linear"):
        AdapterFiles(made)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    made = adapter(tmp_path / "a", 10)
    tensors = {
        key.replace(".weight", f".{name}.weight"): v.clone() for name in "xy" for key, v in adapter_tensors(1).items()
    }
    save_file(tensors, made / "adapter_model.safetensors")
    with raises_kind(UNSUPPORTED, ".x.weight", ".y.weight"):
        AdapterFiles(made)


@pytest.mark.parametrize("shape", [(0,), (8,)])
def test_factors_that_zero_3_left_in_shards_are_damaged(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = adapter(tmp_path / "a", 10)
    save_file(adapter_tensors(10) | {KEY: torch.ones(shape)}, made / "adapter_model.safetensors")
    with raises_kind("checkpoint-damaged", KEY, "ZeRO-3"):
        AdapterFiles(made)


def expert_tensors(ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    key = "base_model.model.layers.0.mlp.experts{}.lora_{}.weight"
    sides = [{key.format(n, "A"): torch.ones(r, 6), key.format(n, "B"): torch.ones(6, r)} for n, r in ranks.items()]
    return {name: tensor for side in sides for name, tensor in side.items()}


@pytest.mark.parametrize(
    ("ranks", "targets", "kind"),
    [
        ({"": 7}, ["mlp.experts.down_proj"], "checkpoint-other-model"),
        ({"": 8, ".base_layer": 8}, ["mlp.experts.down_proj"], UNSUPPORTED),
        ({"": 8, ".base_layer": 8}, ["mlp.experts.down_proj", "mlp.experts.v1"], UNSUPPORTED),
    ],
)
def test_fused_factors_fit_the_config(tmp_path: Path, ranks: dict[str, int], targets: list[str], kind: str) -> None:
    made = configured(tmp_path / "a", target_parameters=targets)
    save_file(expert_tensors(ranks), made / "adapter_model.safetensors")
    with raises_kind(kind, "down_proj"):
        AdapterFiles(made)

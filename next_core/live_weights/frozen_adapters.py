"""PEFT adapters in a live model: the one that trains, and the frozen ones that hold jumps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from next_core.appliers.jump_adapter import adapter_settings, balanced
from next_core.errors import BackendError, describe, unsupported
from next_core.mathematics.low_rank import LowRank
from next_core.process.containment import same_random_states
from next_core.sources.layouts import JUMP_PREFIX

FACTORS_INSTEAD = "use a coefficient predictor with space: factors"


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a PEFT model; peft is not imported."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def trained_adapter(model: Any) -> str:
    """Return the name of the adapter that trains."""
    names: list[str] = [name for name in model.base_model.active_adapters if not name.startswith(JUMP_PREFIX)]
    if len(names) != 1:
        raise unsupported(f"the active adapters to train are {names or 'none'}; activate exactly one")
    return names[0]


def jump_adapters(model: Any) -> list[str]:
    """Return the names of a PEFT model's frozen jump adapters, oldest first."""
    names = [name for name in model.peft_config if name.startswith(JUMP_PREFIX)]
    return sorted(names, key=_number)


def _number(adapter: str) -> int:
    return int(adapter.removeprefix(JUMP_PREFIX))


def activate_jumps(model: Any) -> list[str]:
    """Activate and freeze all jump adapters again, as after ``resume_from_checkpoint``. Returns their names."""
    jumps = jump_adapters(model)
    if jumps:
        for name in jumps:
            _freeze(model, name)
        model.base_model.set_adapter([trained_adapter(model), *jumps])
    return jumps


def next_name(model: Any) -> str:
    """Return the name of the next jump adapter."""
    return f"{JUMP_PREFIX}{max(map(_number, jump_adapters(model)), default=0) + 1}"


def add_frozen_adapter(model: Any, name: str, deltas: Mapping[str, LowRank]) -> None:
    """Add an active frozen adapter whose B A is exactly each delta."""
    from peft import LoraConfig

    trained = model.peft_config[trained_adapter(model)]
    tied = getattr(trained, "ensure_weight_tying", False)
    reason = None
    if "ref" in model.peft_config:
        reason = "its reference policy is an adapter named 'ref', and switching to it deactivates jump adapters"
    elif tied and any(".lora_embedding_A." in name for name, _ in model.named_parameters()):
        reason = "with ensure_weight_tying its head and embedding share factors, and a jump would move the head alone"
    if reason is not None:
        raise unsupported(
            f"this model takes no jump adapter: {reason}; {FACTORS_INSTEAD}, or start from a merged model"
        )
    settings = adapter_settings(deltas)
    config = LoraConfig(**settings, task_type=trained.task_type, fan_in_fan_out=trained.fan_in_fan_out)
    with same_random_states():  # PEFT draws initial weights, which are overwritten
        model.add_adapter(name, config)
    for parameter, delta in deltas.items():
        if delta.rank == 0:
            continue
        layer = model.base_model.model.get_submodule(parameter.removesuffix(".weight"))
        with torch.no_grad():
            for table, value in zip((layer.lora_A, layer.lora_B), balanced(delta), strict=True):
                table[name].weight.copy_(value)
    activate_jumps(model)


def add_saved_adapter(model: Any, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Add an active frozen adapter from the config and the tensors of its files."""
    from peft import PeftConfig

    with same_random_states():
        model.add_adapter(name, PeftConfig.from_peft_type(**config))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in tensors.items():
            parameters[f"{key.removesuffix('.weight')}.{name}.weight"].copy_(value)
    activate_jumps(model)


def rehearse_adapter(model: Any) -> None:
    """Add a jump adapter that does nothing, read it as the trainer's checkpoints do, and remove it.

    Raises ``BackendError`` for a model in which every jump in merged space must fail.
    """
    from peft import get_peft_model_state_dict

    try:
        name = next_name(model)
        add_frozen_adapter(model, name, _zeros(model, trained_adapter(model)))
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        remove_adapter(model, name)
    except BackendError:
        raise
    except Exception as error:  # PEFT has no class of errors for what it cannot do
        raise unsupported(
            "this model takes no second adapter next to the trained one, which a jump in merged space needs "
            f"({describe(error)}): {FACTORS_INSTEAD}"
        ) from error


def _zeros(model: Any, adapter: str) -> dict[str, LowRank]:
    """Return a delta of zeros and rank 1 for every matrix that an adapter moves."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        tables = [getattr(layer, side, {}) for side in ("lora_A", "lora_B")]
        if not all(adapter in table for table in tables):
            continue
        # Under ZeRO-3 the tensors are empty between forward passes.
        shapes = [getattr(table[adapter].weight, "ds_shape", table[adapter].weight.shape) for table in tables]
        if len(shapes[0]) != 2:
            continue
        (_, n), (m, _) = shapes
        key = f"{name}[0]" if hasattr(layer, "parameter_name") else f"{name}.weight"
        found[key] = LowRank(torch.zeros(m, 1).double(), torch.zeros(1, n).double())
    return found


def remove_adapter(model: Any, name: str) -> None:
    """Delete a jump adapter, if the model has it; the others stay active."""
    if name not in model.peft_config:
        return
    active = [other for other in model.base_model.active_adapters if other != name]
    model.delete_adapter(name)
    model.base_model.set_adapter(active)
    activate_jumps(model)


def _freeze(model: Any, adapter: str) -> None:
    """Turn an adapter's weights into buffers, which no optimizer trains."""
    for layer in model.modules():
        for table in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})):
            if adapter in table and isinstance(table[adapter].weight, nn.Parameter):
                weight = table[adapter].weight.detach()
                del table[adapter].weight
                table[adapter].register_buffer("weight", weight)

"""Weights out of and into a policy that DeepSpeed trains. Runs in every rank of ``PolicyModelActor``.

DeepSpeed trains fp32 masters and keeps the model in half precision; we read the masters and write both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from lora import freeze_adapters, in_parts
from safetensors.torch import save_file
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD = 2**31
"""Bytes of one file of a full model."""


def save(actor: Any, folder: str) -> None:
    """Write the trained weights as fp32 safetensors: an adapter in PEFT's format, or a model in shards."""
    module = actor.actor.model.module
    lora = hasattr(module, "peft_config")
    if lora and _first():
        module.peft_config["default"].save_pretrained(folder)
    masters = ((name, _master(parameter)) for name, parameter in _trained(module))
    _write(Path(folder), masters, "adapter_model" if lora else "model")


def save_moments(actor: Any, file: str) -> None:
    """Write Adam's moments of the trained weights."""
    _link_moments(actor.actor_optim)
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(actor.actor.model.module):
        for key in MOMENTS:
            value = safe_get_full_optimizer_state(parameter, key)
            if value is not None and _first():
                found[f"{key}/{name}"] = value.cpu().contiguous()
    if _first():
        save_file(found, file)


@torch.no_grad()
def load(
    actor: Any, folder: str | None, shifts: list[str], adapters: list[str], moments: str | None, schedule: int | None
) -> None:
    """Replace the trained weights, the moments if there are any, and the frozen adapters.

    ``folder`` None keeps the weights. ``schedule`` advances a fresh learning-rate schedule by so many optimizer steps.
    Raises ``RuntimeError`` if a master, or the half-precision weight on some rank, does not hold what was written.
    """
    module = actor.actor.model.module
    for _ in range(schedule or 0):
        actor.actor_scheduler.step()
    if hasattr(module, "peft_config"):
        freeze_adapters(module, [Path(path) for path in adapters])
    if folder is None:
        return
    refused: list[str] = []
    stored, added = _Files(Path(folder).glob("*.safetensors")), [_Files([Path(path)]) for path in shifts]
    kept = _Files([Path(moments)]) if moments is not None else None
    if kept is not None:
        _link_moments(actor.actor_optim)
    for name, parameter in _trained(module):
        value, key = stored[name], _shift_key(name)
        for shift in added:
            if key in shift.keys:
                value = value + shift[key]
            for index in range(len(value) if value.dim() == 3 else 0):  # experts move one by one
                if f"{key}[{index}]" in shift.keys:
                    value[index] += shift[f"{key}[{index}]"]
        _set(parameter, value)
        if not _holds(parameter, value):
            refused.append(name)
        if kept is not None:
            for moment in MOMENTS:
                _set_state(parameter, kept[f"{moment}/{name}"], moment)
    _raise_everywhere(refused)


class _Files:
    """The tensors of safetensors files by name, in fp32."""

    def __init__(self, paths: Any) -> None:
        opened: list[Any] = [safetensors.safe_open(path, "pt") for path in paths]
        self.keys = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - a file, not a dict

    def __getitem__(self, key: str) -> Tensor:
        value: Tensor = self.keys[key].get_tensor(key)
        return value.float()


def _trained(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the trained parameters by their names in a checkpoint."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name.replace(".default.weight", ".weight") if ".lora_" in name else name, parameter


def _shift_key(name: str) -> str:
    """Return the name of a trained tensor in a jump's shift file."""
    if ".lora_" not in name:
        return name
    module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"{module}.weight.{side}"


def _master(parameter: Any) -> Tensor:
    """Return the whole weight in fp32; collective. Raises ``RuntimeError`` if DeepSpeed keeps no master."""
    found: Tensor | None = safe_get_full_fp32_param(parameter)
    if found is None:
        raise RuntimeError("DeepSpeed keeps no fp32 masters of the trained weights; use ZeRO")
    return found


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], stem: str) -> None:
    """Write shards, one in memory at a time, with an index if there are several. Collective; rank 0 writes."""
    held = ((name, value.cpu().contiguous() if _first() else value[:0]) for name, value in tensors)
    files: dict[str, str] = {}
    size = 0
    for number, part in enumerate(in_parts(held, SHARD), start=1):
        if _first():
            file = f"{stem}-{number:05d}.safetensors"
            save_file(dict(part), folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys((name for name, _ in part), file)
            size += sum(value.numel() * value.element_size() for _, value in part)
    shards = sorted(set(files.values()))
    if len(shards) == 1:
        (folder / shards[0]).rename(folder / f"{stem}.safetensors")
    elif shards:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _set(parameter: Any, value: Tensor) -> None:
    """Write the half-precision weight and the master."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    _set_state(parameter, value, None)


def _holds(parameter: Any, value: Tensor) -> bool:
    """Whether the master, and the weight of a forward pass on this rank, are ``value``; collective."""
    master = _master(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        half = parameter.data
        return torch.equal(master, value.to(master.device)) and torch.equal(half, value.to(half))


def _raise_everywhere(refused: list[str]) -> None:
    """Raise ``RuntimeError`` on all ranks if one refused a weight: alone it would leave the others waiting."""
    everywhere: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, refused)
    found = [f"'{names[0]}' on rank {rank}" for rank, names in enumerate(everywhere) if names]
    if found:
        raise RuntimeError(f"DeepSpeed did not take the new weights of {', '.join(found)}")


def _set_state(parameter: Any, value: Tensor, key: str | None) -> None:
    """Write the master (``key`` None) or a moment, of which each rank may hold a part."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        part = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        count, rank = part.numel(), torch.distributed.get_rank(parameter.ds_process_group)
        own = value.flatten()[rank * count : (rank + 1) * count].to(part.device)
        own = torch.nn.functional.pad(own, (0, count - own.numel())).view_as(part)  # the last rank's is padded
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)
    elif getattr(parameter, "_hp_mapping", None) is not None:
        parameter.set_full_hp_param(value.to(parameter.device), key)


def _link_moments(optimizer: Any) -> None:
    """Let DeepSpeed find each parameter's moments: offloaded states come back unlinked (0.19)."""
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _first() -> bool:
    return bool(torch.distributed.get_rank() == 0)

"""Weights out of and into a policy that DeepSpeed trains. Runs in every rank of ``PolicyModelActor``.

DeepSpeed trains fp32 masters and keeps the model in half precision beside them; weights are read from the masters and
written to both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from lora import act_beside
from safetensors.torch import save_file
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD = 2**31
"""Bytes of one file of a full model."""


def save(actor: Any, folder: str) -> None:
    """Write what trains as fp32 safetensors: an adapter in PEFT's format, or a model in shards."""
    module = actor.actor.model.module
    if hasattr(module, "peft_config"):
        if _first():
            module.peft_config["default"].save_pretrained(folder)
        _write(Path(folder), _masters(module), "adapter_model")
    else:
        _write(Path(folder), _masters(module), "model")


def save_moments(actor: Any, file: str) -> None:
    """Write Adam's moments of what trains."""
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
    actor: Any, folder: str | None, shifts: list[str], beside: list[str], moments: str | None, schedule: int | None
) -> float:
    """Put weights (and moments) in the place of those that train; returns how far these moved, by Frobenius norm.

    ``schedule`` takes a fresh learning-rate schedule to where the run's is. Raises ``RuntimeError`` when a master, or
    the half-precision weight on some rank, is not what was put there.
    """
    module = actor.actor.model.module
    if schedule is not None:
        for _ in range(schedule):
            actor.actor_scheduler.step()
    if hasattr(module, "peft_config"):
        act_beside(module, [Path(path) for path in beside])
    elif beside:
        raise ValueError("an adapter cannot stand beside a policy that trains all its weights")
    if folder is None:
        return 0.0
    squares = 0.0
    refused: list[str] = []
    stored, moves = _Files(Path(folder).glob("*.safetensors")), [_Files([Path(path)]) for path in shifts]
    kept = _Files([Path(moments)]) if moments is not None else None
    if kept is not None:
        _link_moments(actor.actor_optim)
    for name, parameter in _trained(module):
        value = stored[name]
        for move in moves:
            key = _shift_key(name)
            if key in move.keys:
                value = value + move[key]
        before = _master(parameter)
        value = value.to(before.device)
        _set(parameter, value)
        if not _took(parameter, value):
            refused.append(name)
        squares += float((value - before).square().sum())
        if kept is not None:
            for key in MOMENTS:
                _set_state(parameter, kept[f"{key}/{name}"], key)
    _agree(refused)
    return math.sqrt(squares)


class _Files:
    """Tensors of some safetensors files by name."""

    def __init__(self, paths: Any) -> None:
        opened: list[Any] = [safetensors.safe_open(path, "pt") for path in paths]
        self.keys = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - no dict, but a file

    def __getitem__(self, key: str) -> Tensor:
        value: Tensor = self.keys[key].get_tensor(key)
        return value.float()


def _trained(module: Any) -> Iterator[tuple[str, Any]]:
    """What trains, by its name in a checkpoint."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name.replace(".default.weight", ".weight") if ".lora_" in name else name, parameter


def _shift_key(name: str) -> str:
    """The name of a trained tensor in the file of a jump."""
    if ".lora_" not in name:
        return name
    module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"{module}.weight.{side}"


def _master(parameter: Any) -> Tensor:
    """The whole weight in fp32; collective. Raises ``RuntimeError`` where DeepSpeed keeps none."""
    found: Tensor | None = safe_get_full_fp32_param(parameter)
    if found is None:
        raise RuntimeError("DeepSpeed keeps no fp32 masters of what trains; use ZeRO")
    return found


def _masters(module: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(module):
        yield name, _master(parameter)


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]], stem: str) -> None:
    """Write them file by file; one file has no index."""
    held: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    total = shards = 0

    def flush(name: str) -> None:
        if _first():
            save_file(held, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, name))
        held.clear()

    for name, value in tensors:
        held[name] = value.cpu().contiguous() if _first() else value[:0]
        total += value.numel() * value.element_size()
        if total > (shards + 1) * SHARD:
            shards += 1
            flush(f"{stem}-{shards:05d}.safetensors")
    if shards == 0:
        flush(f"{stem}.safetensors")
        return
    if held:
        flush(f"{stem}-{shards + 1:05d}.safetensors")
    if _first():
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text)


def _set(parameter: Any, value: Tensor) -> None:
    """Half-precision weight and master."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    _set_state(parameter, value, None)


def _took(parameter: Any, value: Tensor) -> bool:
    """Whether the master, and what a forward pass gets on this rank, are what was put there; collective."""
    master = _master(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        half = parameter.data
        return torch.equal(master, value) and torch.equal(half, value.to(half.dtype))


def _agree(refused: list[str]) -> None:
    """Raise ``RuntimeError`` on all ranks where one has something refused: alone it would leave the others waiting."""
    everywhere: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, refused)
    found = [f"'{names[0]}' on rank {rank}" for rank, names in enumerate(everywhere) if names]
    if found:
        raise RuntimeError(f"DeepSpeed did not take the new weights of {', '.join(found)}")


def _set_state(parameter: Any, value: Tensor, key: str | None) -> None:
    """The master (``key`` None) or a moment, of which each rank may hold a part."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        part = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        count, rank = part.numel(), torch.distributed.get_rank(parameter.ds_process_group)
        mine = value.flatten()[rank * count : (rank + 1) * count].to(part.device)
        mine = torch.nn.functional.pad(mine, (0, count - mine.numel())).view_as(part)  # the last rank's is padded
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)
    elif getattr(parameter, "_hp_mapping", None) is not None:
        parameter.set_full_hp_param(value.to(parameter.device), key)


def _link_moments(optimizer: Any) -> None:
    """Let DeepSpeed find each parameter's moments: states that were offloaded come back unlinked (0.19)."""
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _first() -> bool:
    return bool(torch.distributed.get_rank() == 0)

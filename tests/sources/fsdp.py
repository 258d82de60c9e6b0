"""Checkpoints as verl saves them, written on the spot: one file a process, without starting any.

torch's own ``distribute_tensor`` cuts each tensor as FSDP does. ``make test-verl`` reads what the real saver writes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.sources.models import MODULE

LORA = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}


def save_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    mesh: Sequence[int] = (2,),
    placements: Sequence[Any] = (Shard(0),),
    whole: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
) -> Path:
    """Write the file of each process of a mesh of this shape; tensors in ``whole`` are not distributed."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = torch.arange(torch.Size(mesh).numel()).view(*mesh)
    for rank in range(ranks.numel()):
        own = DeviceMesh("cpu", ranks, _init_backend=False, _rank=rank)
        parts = {k: distribute_tensor(t, own, placements, src_data_rank=None) for k, t in tensors.items()}
        own._device_type = device
        # A clone: else each file would hold the whole tensor that its part is a view of.
        for part in parts.values():
            part._local_tensor = part._local_tensor.clone()
        torch.save(parts | dict(whole or {}), folder / f"model_world_size_{ranks.numel()}_rank_{rank}.pt")
    return folder


def verl(root: Path, step: int, tensors: Mapping[str, Tensor], lora: bool = False, **how: Any) -> Path:
    """Write the actor of a step of a verl run, with the files that its manager writes next to the shards."""
    actor = save_shards(root / f"global_step_{step}" / "actor", tensors, **how)
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    if lora:
        (actor / "lora_train_meta.json").write_text(json.dumps(LORA))
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))
    return actor


def lora_state(step: float) -> dict[str, Tensor]:
    """The state of a model with an adapter of rank 2 whose delta is ``4 * step`` everywhere."""
    key = f"base_model.model.{MODULE}"
    return {
        "base_model.model.model.embed_tokens.weight": torch.ones(5, 4),
        f"{key}.base_layer.weight": torch.ones(3, 4),
        f"{key}.lora_A.default.weight": torch.ones(2, 4),
        f"{key}.lora_B.default.weight": torch.full((3, 2), float(step)),
    }

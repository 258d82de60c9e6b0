"""Small checkpoints written by hand, as many as a test needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

MODULE = "model.layers.0.self_attn.q_proj"


def model(folder: Path, step: float, **others: Tensor) -> Path:
    """A model of one matrix that is ``step`` everywhere."""
    folder.mkdir(parents=True)
    save_file({"w.weight": torch.full((3, 2), float(step))} | others, folder / "model.safetensors")
    return folder


def adapter_tensors(step: float) -> dict[str, Tensor]:
    key = f"base_model.model.{MODULE}.lora_{{}}.weight"
    return {key.format("A"): torch.ones(2, 4), key.format("B"): torch.full((3, 2), float(step))}


def adapter(folder: Path, step: float, pickled: bool = False) -> Path:
    """An adapter of rank 2 whose delta is ``2 * step`` everywhere."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    if pickled:
        torch.save(adapter_tensors(step), folder / "adapter_model.bin")
    else:
        save_file(adapter_tensors(step), folder / "adapter_model.safetensors")
    return folder

"""Small checkpoints written by hand, as many as a test needs."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def write_jump(run: Path, step: int, shift: Mapping[str, Tensor] | None = None, number: int = 1) -> Path:
    """Write a jump into a run folder, as far as the checkpoints' readers look at it."""
    folder = run / "jumps" / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "jump.json").write_text(json.dumps({"step": step, "alpha": 1.0, "adapter": None}))
    if shift is not None:
        save_file(dict(shift), folder / "shift.safetensors")
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32, "num_attention_heads": 2}
"""Sizes of a transformers model that is made and saved in a few hundredths of a second."""


def built(architecture: str, config: str, **sizes: Any) -> Any:
    """A transformers model with random weights."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, architecture)(getattr(transformers, config)(**sizes))


@dataclass(frozen=True)
class StraightRun:
    """Full checkpoints of which every weight moves by ``velocity`` in 10 steps, and the model that they begin at."""

    path: Path
    base: Path
    began: Mapping[str, Tensor]
    velocity: Mapping[str, Tensor]

    def at(self, step: float) -> dict[str, Tensor]:
        return {name: value + step / 10 * self.velocity[name] for name, value in self.began.items()}

    def differing(self, folder: Path, model: Any, step: float, unmoved: Sequence[str] = ()) -> list[str]:
        """The parameters that a written model, loaded by transformers, has elsewhere than at ``step``.

        ``unmoved`` and those that are no matrices are expected at the newest checkpoint, step 20.
        """
        loaded, moved, newest = dict(type(model).from_pretrained(folder).named_parameters()), self.at(step), self.at(20)
        wanted = {n: newest[n] if n in unmoved or v.dim() not in (2, 3) else v for n, v in moved.items()}
        assert loaded.keys() == wanted.keys()
        return [name for name, value in loaded.items() if not torch.allclose(value, wanted[name], atol=1e-5)]


@torch.no_grad()
def straight_run(
    folder: Path, model: Any, base: Mapping[str, Any] | None = None, steps: Sequence[int] = (10, 20), **save: Any
) -> StraightRun:
    """Write some steps of a run of a model, and its base; ``base`` and ``save`` are for ``save_pretrained``."""
    model.save_pretrained(folder / "base", **(save if base is None else base))
    began = {name: value.clone() for name, value in model.named_parameters()}
    velocity = {name: 0.01 * torch.randn_like(value) for name, value in began.items()}
    run = StraightRun(folder / "checkpoints", folder / "base", began, velocity)
    for step in steps:
        for name, value in model.named_parameters():
            value.copy_(run.at(step)[name])
        model.save_pretrained(run.path / f"checkpoint-{step}", **save)
    return run

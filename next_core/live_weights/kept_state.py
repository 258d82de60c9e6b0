"""Trained weights and optimizer moments as they were after one step, and the way back to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from next_core.appliers.safetensors_writer import TensorWriter, entry_of
from next_core.errors import unsupported
from next_core.live_weights.trained_weights import TrainedWeights
from next_core.storage.atomic import atomic_file

GROUP_STEP = "group/step"  # The name of a parameter group's step among the moments of its weights


@dataclass(frozen=True)
class KeptState:
    """Copies of this process's shards on the CPU, and of each one's optimizer state, empty before the first step.

    Numbers of a state, such as the step of transformers' Adafactor, are kept as tensors of one element, and so is the
    step that some optimizers count in a parameter group.
    """

    weights: Sequence[Tensor]
    moments: Sequence[dict[str, Tensor]]

    @classmethod
    def of(cls, weights: TrainedWeights) -> KeptState:
        check_state(weights)
        kept, shards, moments = (Tensor, int, float), weights.shards, []
        for shard in shards:
            state, group = weights.state(shard), weights.group(shard)
            moments.append({key: _copy(value) for key, value in state.items() if isinstance(value, kept)})
            moments[-1] |= {GROUP_STEP: _copy(group["step"])} if "step" in group else {}
        return cls([_copy(shard.tensor) for shard in shards], moments)

    @torch.no_grad()
    def restore(self, weights: TrainedWeights) -> None:
        """Put everything back. Moments that did not exist yet are removed: the optimizer makes new ones."""
        for shard, kept, moments in zip(weights.shards, self.weights, self.moments, strict=True):
            shard.tensor.copy_(kept)
            state = weights.state(shard)
            if not moments.keys() - {GROUP_STEP}:
                state.clear()
            for key, value in moments.items():
                holder, name = (weights.group(shard), "step") if key == GROUP_STEP else (state, key)
                if isinstance(holder[name], Tensor):
                    local(holder[name]).copy_(value)
                else:
                    holder[name] = value.item()
        weights.publish(moments=True)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield everything under names for a file; ``from_tensors`` reads them."""
        for index, (weight, moments) in enumerate(zip(self.weights, self.moments, strict=True)):
            yield f"{prefix}{index}/weight", weight
            yield from ((f"{prefix}{index}/{key}", value) for key, value in moments.items())

    def write(self, path: Path) -> str:
        """Write everything to one file, durably, past the page cache. Returns the file's digest."""
        tensors = dict(sorted(self.tensors(), key=lambda item: -item[1].itemsize))  # each aligned to its size
        entries = {name: entry_of(value.dtype, value.shape) for name, value in tensors.items()}
        with atomic_file(path) as scratch, TensorWriter(scratch, entries) as writer:
            for value in tensors.values():
                writer.write(value)
        return writer.digest

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], trained: TrainedWeights, prefix: str = "") -> KeptState:
        """Raises ``ValueError`` for shards of other shapes: copying would repeat a smaller one in a larger one."""
        weights: list[Tensor] = []
        moments: list[dict[str, Tensor]] = []
        for index in range(sum(name.startswith(prefix) and name.endswith("/weight") for name in tensors)):
            start = f"{prefix}{index}/"
            state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            weights.append(state.pop("weight"))
            moments.append(state)
        held, wanted = [tuple(w.shape) for w in weights], [tuple(shard.tensor.shape) for shard in trained.shards]
        if held != wanted:
            raise ValueError(f"its weights have the shapes {held[:3]}..., this process's {wanted[:3]}...")
        return cls(weights, moments)


def check_state(weights: TrainedWeights) -> None:
    """Raise ``BackendError`` where the optimizer's state holds what cannot be kept, such as a list of tensors."""
    weights.check()
    for shard in weights.shards:
        for key, value in weights.state(shard).items():
            if not isinstance(value, Tensor | int | float | str | None):
                raise unsupported(
                    f"{type(weights.optimizer).__name__} keeps a {type(value).__name__} as '{key}' in its state, which "
                    "no rollback could restore; choose another optimizer, such as AdamW"
                )


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; it shares memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _copy(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

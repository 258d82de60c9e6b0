"""Trained weights and optimizer moments as they were after one step, and the way back to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from next_core.appliers.safetensors_writer import TensorWriter, entry_of
from next_core.live_weights.trained_weights import TrainedWeights
from next_core.storage.atomic import atomic_file


@dataclass(frozen=True)
class KeptState:
    """Copies of this process's shards on the CPU, and of each one's optimizer state, empty before the first step.

    Numbers of a state, such as the step of transformers' Adafactor, are kept as tensors of one element.
    """

    weights: Sequence[Tensor]
    moments: Sequence[dict[str, Tensor]]

    @classmethod
    def of(cls, weights: TrainedWeights) -> KeptState:
        kept, shards = (Tensor, int, float), weights.shards
        moments = [
            {key: _copy(value) for key, value in weights.state(shard).items() if isinstance(value, kept)}
            for shard in shards
        ]
        return cls([_copy(shard.tensor) for shard in shards], moments)

    @torch.no_grad()
    def restore(self, weights: TrainedWeights) -> None:
        """Put everything back. Moments that did not exist yet are removed: the optimizer makes new ones."""
        for shard, kept, moments in zip(weights.shards, self.weights, self.moments, strict=True):
            shard.tensor.copy_(kept)
            state = weights.state(shard)
            if not moments:
                state.clear()
            for key, value in moments.items():
                if isinstance(state[key], Tensor):
                    local(state[key]).copy_(value)
                else:
                    state[key] = value.item()
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


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; it shares memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _copy(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

"""Trained weights and optimizer moments as they were after one step, and the way back to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class KeptState:
    """Copies on the CPU: ``weights``, and of each parameter its optimizer state, empty before the first step.

    Numbers of a state, such as the step of transformers' Adafactor, are kept as tensors of one element.
    """

    weights: Sequence[Tensor]
    moments: Sequence[dict[str, Tensor]]

    @classmethod
    def of(cls, parameters: Sequence[nn.Parameter], optimizer: Any) -> KeptState:
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        kept = (Tensor, int, float)
        moments = [{key: _copy(value) for key, value in state.items() if isinstance(value, kept)} for state in states]
        return cls([_copy(parameter) for parameter in parameters], moments)

    @torch.no_grad()
    def restore(self, parameters: Sequence[nn.Parameter], optimizer: Any) -> None:
        """Put everything back. Moments that did not exist yet are removed: the optimizer makes new ones."""
        for parameter, kept, moments in zip(parameters, self.weights, self.moments, strict=True):
            parameter.copy_(kept)
            state = optimizer.state.get(parameter, {})
            if not moments:
                state.clear()
            for key, value in moments.items():
                if isinstance(state[key], Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value.item()

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Yield everything under names for a file; ``from_tensors`` reads them."""
        for index, (weight, moments) in enumerate(zip(self.weights, self.moments, strict=True)):
            yield f"{prefix}{index}/weight", weight
            yield from ((f"{prefix}{index}/{key}", value) for key, value in moments.items())

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> KeptState:
        weights: list[Tensor] = []
        moments: list[dict[str, Tensor]] = []
        for index in range(sum(name.startswith(prefix) and name.endswith("/weight") for name in tensors)):
            start = f"{prefix}{index}/"
            state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            weights.append(state.pop("weight"))
            moments.append(state)
        return cls(weights, moments)


def _copy(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

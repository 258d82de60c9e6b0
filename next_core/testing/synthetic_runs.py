"""Tiny runs in memory for the checks, made from a seed: they drift, bend and are noisy, and one matrix stands still."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors

SHAPES: Mapping[str, tuple[int, int]] = {
    "model.layers.0.q_proj.weight": (6, 5),
    "model.layers.0.up_proj.weight": (8, 5),
    "model.layers.1.q_proj.weight": (6, 5),
    "model.layers.1.down_proj.weight": (5, 8),
    "model.layers.1.k_proj.weight": (4, 5),
}
FROZEN = "model.layers.1.k_proj.weight"
"""The matrix that never moves."""
RANK = 3
SCALING = 2.0

Weight = LoraFactors | Tensor


class SyntheticRun(MemorySource):
    """A run whose step 0, where it was kept, can be read but is no observation: as the sources on disk have it."""

    def __init__(
        self,
        checkpoints: Mapping[int, Mapping[str, Weight]],
        backbone: Mapping[str, Tensor] | None = None,
        metrics: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__(checkpoints, backbone, metrics)
        self._given = backbone, metrics

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step in super().steps if step > 0)

    @property
    def weights(self) -> Mapping[int, Mapping[str, Weight]]:
        """All that is kept, step 0 included."""
        return self._checkpoints

    def only(self, steps: Sequence[int]) -> SyntheticRun:
        """The same run with these checkpoints alone."""
        return SyntheticRun({step: self._checkpoints[step] for step in steps}, *self._given)

    def mapped(self, change: Callable[[Weight], Weight], names: Sequence[str] | None = None) -> SyntheticRun:
        """The run with every stored value changed, its matrices in the order of ``names``."""
        order = list(self._checkpoints[self.steps[-1]]) if names is None else list(names)
        return SyntheticRun(
            {step: {name: change(at[name]) for name in order} for step, at in self._checkpoints.items()}, *self._given
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of it, by a name of its own; not copies."""
        found = {f"backbone/{name}": value for name, value in self._backbone.items()}
        for step, at in self._checkpoints.items():
            for name, value in at.items():
                parts = {"A": value.A, "B": value.B} if isinstance(value, LoraFactors) else {"W": value}
                found |= {f"{step}/{name}/{part}": tensor for part, tensor in parts.items()}
        return found


def lora_run(
    steps: Sequence[int] = tuple(range(5, 55, 5)),
    *,
    seed: int = 0,
    curvature: float = 0.3,
    noise: float = 0.02,
    start: bool = True,
    moves: bool = True,
) -> SyntheticRun:
    """LoRA checkpoints, fp32, with s = step / last step: A = A_0 + s a / 4, B = s b + curvature s^2 c, and noise.

    ``start`` keeps step 0; without ``moves`` every matrix stands still. The metrics ``reward`` and ``accuracy`` rise.
    """
    last = steps[-1]
    drawn = {
        name: [
            _gauss(seed, name, what, *shape)
            for what, shape in zip("Aabc", 2 * [(RANK, n)] + 2 * [(m, RANK)], strict=True)
        ]
        for name, (m, n) in SHAPES.items()
    }

    def at(name: str, step: int) -> LoraFactors:
        (m, n), s = SHAPES[name], step / last if moves and name != FROZEN else 0.0
        start, a, b, c = drawn[name]
        A, B = start + s / 4 * a, s * b + curvature * s**2 * c
        if s > 0:
            A, B = A + noise * _gauss(seed, name, f"A{step}", RANK, n), B + noise * _gauss(seed, name, step, m, RANK)
        return LoraFactors(A.float(), B.float(), SCALING)

    kept = (0, *steps) if start else tuple(steps)
    return SyntheticRun({t: {name: at(name, t) for name in SHAPES} for t in kept}, None, _metrics(steps))


def dense_run(
    steps: Sequence[int] = tuple(range(5, 55, 5)),
    *,
    seed: int = 0,
    curvature: float = 0.3,
    noise: float = 0.02,
    moves: bool = True,
) -> SyntheticRun:
    """Full-parameter checkpoints, fp32: W = W_0 + s D + curvature s^2 E and noise, s = step / last step."""
    last = steps[-1]
    backbone = {name: _gauss(seed, name, "W", *shape).float() for name, shape in SHAPES.items()}
    drawn = {name: [_gauss(seed, name, what, *shape) for what in "DE"] for name, shape in SHAPES.items()}

    def at(name: str, step: int) -> Tensor:
        s, shape = step / last if moves and name != FROZEN else 0.0, SHAPES[name]
        D, E = drawn[name]
        moved = s * D + curvature * s**2 * E
        if s > 0:
            moved = moved + noise * _gauss(seed, name, step, *shape)
        return (backbone[name] + moved).float()

    return SyntheticRun({t: {name: at(name, t) for name in SHAPES} for t in steps}, backbone, _metrics(steps))


def _metrics(steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """Logged after each checkpoint but before the next; they rise, not quite evenly."""
    found = {}
    for index, step in enumerate(steps):
        rise = step / steps[-1] + 0.01 * (-1) ** index
        found[step] = {"reward": 0.2 + 0.5 * rise, "accuracy": 0.3 + 0.4 * rise}
    return found


def _gauss(seed: int, name: str, what: object, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{what}".encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

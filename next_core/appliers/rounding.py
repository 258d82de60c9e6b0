"""Rounding to the precision that is stored, and the share of a jump that survives it."""

import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]

_UPPER_HALF = 1 if sys.byteorder == "little" else 0


class Rounder:
    """Rounds the blocks of one parameter, in order.

    Stochastic: x between two neighbours a < b becomes b with probability (x - a) / (b - a), so that its mean is x;
    values that can be stored exactly stay. The draws depend on the seed and the parameter's name alone.
    """

    def __init__(self, rounding: Rounding, dtype: torch.dtype, seed: int, name: str) -> None:
        self.dtype = dtype
        self._stochastic = rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16)
        # torch's CPU generator uses only the low 32 bits of a seed: mix seed and name into those.
        self._generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (fp32 or fp64) in ``dtype``; values beyond its range become infinite."""
        if not self._stochastic:
            return x.to(self.dtype)
        x = x.float().contiguous()
        return self._to_bfloat16(x) if self.dtype is torch.bfloat16 else self._to_float16(x)

    def _to_bfloat16(self, x: Tensor) -> Tensor:
        """bf16 is the upper half of the 32 bits: add a random 16-bit number, then cut the lower half off."""
        bits = self._random16(x.numel()).to(torch.int32).bitwise_and_(0xFFFF).reshape(x.shape)
        bits += x.view(torch.int32)
        return bits.view(torch.int16)[..., _UPPER_HALF::2].contiguous().view(torch.bfloat16)

    def _to_float16(self, x: Tensor) -> Tensor:
        """In units of the spacing at x (2^-24 below the smallest normal number): the floor, plus 1 by chance."""
        exponent = torch.frexp(x).exponent
        unit = (exponent - 11).clamp_(min=-24)
        scaled = torch.ldexp(x.abs(), -unit)
        whole = scaled.floor()
        whole += torch.rand(x.shape, generator=self._generator) < scaled - whole
        return torch.ldexp(whole, unit).copysign(x).to(torch.float16)

    def _random16(self, count: int) -> Tensor:
        """Return ``count`` uniform 16-bit numbers, four of each 64-bit draw."""
        drawn = torch.empty(-(-count // 4), dtype=torch.int64)
        drawn.random_(-(2**63), None, generator=self._generator)
        return drawn.view(torch.int16)[:count]


@dataclass
class WrittenShare:
    """<written - start, wanted> / <wanted, wanted>, summed over blocks: 1 when rounding lost nothing."""

    along: float = 0.0
    wanted: float = 0.0

    def add(self, moved: Tensor, wanted: Tensor) -> None:
        """Count a block that moved by ``moved`` and should have moved by ``wanted``."""
        moved, wanted = moved.reshape(-1), wanted.reshape(-1)
        self.along += float(torch.dot(moved, wanted))
        self.wanted += float(torch.dot(wanted, wanted))

    @property
    def value(self) -> float | None:
        """The share; None where nothing should have moved."""
        return self.along / self.wanted if self.wanted > 0 else None


@dataclass
class ParameterLoss:
    """What rounding did to one parameter.

    ``jump`` counts from the newest checkpoint, rounded to the stored precision. ``update`` (LoRA runs) counts from the
    backbone as stored, so it includes training. ``changed`` of ``elements`` stored values differ because of the jump.
    """

    elements: int = 0
    changed: int = 0
    jump: WrittenShare = field(default_factory=WrittenShare)
    update: WrittenShare = field(default_factory=WrittenShare)

    def add_jump(self, moved: Tensor, wanted: Tensor) -> None:
        """Count a block of the jump."""
        self.jump.add(moved, wanted)
        # As integers, and by numpy: ten times faster. No value is -0, for x - x is +0.
        self.changed += int(np.count_nonzero(moved.numpy().view(f"i{moved.itemsize}")))


@dataclass
class RoundingLoss:
    """What rounding did to one jump."""

    parameters: dict[str, ParameterLoss] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """Return the written share of the jump of each parameter that should have moved."""
        values = {name: loss.jump.value for name, loss in self.parameters.items()}
        return {name: value for name, value in values.items() if value is not None}

    def facts(self, lowest: int = 10) -> Mapping[str, Any]:
        """Return figures over all parameters, and the parameters with the ``lowest`` shares."""
        losses = self.parameters.values()
        worst = sorted((value, name) for name, value in self.shares().items())[:lowest]
        return {
            "share_of_jump": _pooled(loss.jump for loss in losses),
            "share_of_update": _pooled(loss.update for loss in losses),
            "lowest_shares_of_jump": {name: value for value, name in worst},
            "parameters_moved": sum(1 for loss in losses if loss.changed),
            "elements_changed": sum(loss.changed for loss in losses),
            "elements": sum(loss.elements for loss in losses),
        }


def _pooled(shares: Iterable[WrittenShare]) -> float | None:
    """Return one share over all parameters, each weighted by the squared norm of its move."""
    every = list(shares)
    return WrittenShare(sum(s.along for s in every), sum(s.wanted for s in every)).value

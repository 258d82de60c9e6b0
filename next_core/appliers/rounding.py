"""Back to the precision that is stored: to the nearest value, or to one of the two neighbours by chance, unbiased."""

from __future__ import annotations

import sys
import zlib
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]

_UPPER_HALF = 1 if sys.byteorder == "little" else 0


class Rounder:
    """Rounds the blocks of one parameter, in order.

    Stochastic: x between two neighbours a < b becomes b with probability (x - a) / (b - a), so that the mean is x;
    what can be stored exactly stays exactly. The draws depend on the seed and the parameter's name alone.
    """

    def __init__(self, rounding: Rounding, dtype: torch.dtype, seed: int, name: str) -> None:
        self.dtype = dtype
        self._stochastic = rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16)
        # Of a seed, torch's CPU generator uses the low 32 bits only: both have to be in them.
        self._generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))

    def __call__(self, x: Tensor) -> Tensor:
        """x (fp32 or fp64) in ``dtype``; values beyond its range become infinite, which the caller has to refuse."""
        if not self._stochastic:
            return x.to(self.dtype)
        x = x.float()
        return (self._bfloat16 if self.dtype is torch.bfloat16 else self._float16)(x.contiguous())

    def _bfloat16(self, x: Tensor) -> Tensor:
        """Of the 32 bits, bf16 keeps the upper 16: add a random number below 2^16, cut off."""
        bits = self._random16(x.numel()).to(torch.int32).bitwise_and_(0xFFFF).reshape(x.shape)
        bits += x.view(torch.int32)
        return bits.view(torch.int16)[..., _UPPER_HALF::2].contiguous().view(torch.bfloat16)

    def _float16(self, x: Tensor) -> Tensor:
        """In units of the spacing at x (2^-24 below the smallest normal number): the integer part, plus 1 by chance."""
        exponent = torch.frexp(x).exponent
        unit = (exponent - 11).clamp_(min=-24)
        scaled = torch.ldexp(x.abs(), -unit)
        whole = scaled.floor()
        draw = torch.rand(x.shape, generator=self._generator)
        whole += draw < scaled - whole
        return torch.ldexp(whole, unit).copysign(x).to(torch.float16)

    def _random16(self, count: int) -> Tensor:
        """``count`` uniform 16-bit numbers, four of each 64-bit draw."""
        drawn = torch.empty(-(-count // 4), dtype=torch.int64)
        drawn.random_(-(2**63), None, generator=self._generator)
        return drawn.view(torch.int16)[:count]

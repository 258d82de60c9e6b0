"""An axis, and the scale that puts its values on pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """What an axis shows; its ends come from the data where they are None."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False


class Scale:
    """Values to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, first: float, last: float, log: bool = False) -> None:
        self.low, self.high, self._first, self._last, self._log = low, high, first, last, log

    @classmethod
    def of(cls, axis: Axis, values: Iterable[float], first: float, last: float) -> Scale:
        """Return a scale that has all values, from the axis' own ends where it has them."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not axis.log)] or [1.0]
        low = min(known) if axis.low is None else axis.low
        high = max(known) if axis.high is None else axis.high
        if axis.log:
            high = max(high, low * 1.5)
            return cls(low / 1.1 if axis.low is None else low, high * 1.1, first, last, True)
        span = (high - low) or abs(high) or 1.0
        return cls(low - 0.05 * span * (axis.low is None), high + 0.05 * span * (axis.high is None), first, last)

    def __call__(self, value: float) -> float:
        low, high, inside = self.low, self.high, min(max(value, self.low), self.high)
        if self._log:
            low, high, inside = math.log(low), math.log(high), math.log(inside)
        return round(self._first + (self._last - self._first) * (inside - low) / (high - low), 1)

    def ticks(self, most: int) -> list[float]:
        """Return at most about ``most`` round numbers."""
        if self._log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= most:
                    break
            return found[:: math.ceil(len(found) / most)] if found else []
        rough = (self.high - self.low) / most
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= rough * 0.999)
        return [step * at for at in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

"""Charts of rows: names with values and intervals along one axis."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from next_core.drawing.chart import Chart
from next_core.drawing.elements import GLYPH, NARROW, label, path, short, tag, text
from next_core.drawing.scale import Axis, Scale


@dataclass(frozen=True)
class Dot:
    """A value in a row, with its interval and single seeds."""

    value: float
    ends: tuple[float, float] | None = None
    each: Sequence[float] = ()
    colour: str = "c0"


@dataclass(frozen=True)
class Rows(Chart):
    """Names with values and intervals along one axis; ``walk`` are grey intervals behind, by name."""

    rows: Mapping[str, Sequence[Dot]]
    x: Axis
    walks: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Low, mean and high of a random walk."""
    legend: Mapping[str, str] = field(default_factory=dict)
    """Words and their colours."""

    def keys(self) -> Mapping[str, Mapping[str, Any]]:
        return {words: {"colour": colour} for words, colour in self.legend.items()}

    def paint(self, width: int) -> tuple[float, list[str]]:
        above = width == NARROW  # names stand above their rows on a phone
        left = 10.0 if above else 14 + GLYPH * max((len(label(name)) for name in self.rows), default=0)
        known = [x for dots in self.rows.values() for dot in dots for x in (dot.value, *(dot.ends or ()), *dot.each)]
        across = Scale.of(self.x, [*known, *(end for walk in self.walks.values() for end in walk)], left, width - 14)
        parts, step, top = list[str](), 38 if above else 26, 12.0
        bottom = top + step * len(self.rows)
        for tick in across.ticks(max(2, int((width - left) / 90))):
            parts.append(path([(across(tick), top), (across(tick), bottom)], "line", 1))
            parts.append(text(across(tick), bottom + 15, short(tick), anchor="middle"))
        if across.low <= 0 <= across.high:
            parts.append(path([(across(0), top), (across(0), bottom)], "soft", 1.2))
        for index, (name, dots) in enumerate(self.rows.items()):
            y = top + step * index + step / 2 + (7 if above else 0)
            x, anchor = (0.0, None) if above else (left - 10, "end")
            parts.append(text(x, y - (16 if above else -4), label(name), anchor, fill="ink"))
            if (walk := self.walks.get(name)) is not None:
                ends, mean = [(across(walk[place]), y) for place in (0, 2)], across(walk[1])
                parts.append(path(ends, "walk", 9, opacity=0.4) + path([(mean, y - 6), (mean, y + 6)], "walk", 1.5))
            for place, dot in enumerate(dots):
                parts.append(_dot(dot, across, y + 7 * (place - (len(dots) - 1) / 2), name))
        parts.append(text(width - 14, bottom + 33, self.x.label, anchor="end"))
        return bottom + 42, parts


def _dot(dot: Dot, across: Scale, y: float, name: str) -> str:
    ends = "" if dot.ends is None else f" ({short(dot.ends[0])} to {short(dot.ends[1])})"
    parts = [f"<title>{html.escape(label(name))}: {short(dot.value)}{ends}</title>"]
    parts += [path([(across(one), y - 4), (across(one), y + 4)], dot.colour, 1, opacity=0.6) for one in dot.each]
    if dot.ends is not None:
        parts.append(path([(across(end), y) for end in dot.ends], dot.colour, 2))
    parts.append(tag("circle", cx=across(dot.value), cy=f"{y:g}", r=4, fill=f"var(--{dot.colour})"))
    return f"<g>{''.join(parts)}</g>"

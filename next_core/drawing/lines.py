"""Charts of lines: panels one below the other over one x axis, with lanes of marks."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from next_core.drawing.chart import Chart
from next_core.drawing.elements import GLYPH, NARROW, joined, label, path, short, tag, text
from next_core.drawing.scale import Axis, Scale

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """A line, perhaps with a band from ``low`` to ``high``; None is a gap. ``stepped``: values hold until the next."""

    name: str
    x: Values
    y: Values
    low: Values = ()
    high: Values = ()
    colour: str = "c0"
    dashed: bool = False
    dots: bool = False
    joined: bool = True
    stepped: bool = False
    size: float = 2.6
    """Radius of a dot in pixels."""

    def points(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if x is not None and y is not None]


@dataclass(frozen=True)
class Panel:
    """Lines over one y axis; ``rule`` is a value worth a line across, ``share`` the panel's part of the height."""

    lines: Sequence[Line]
    y: Axis = field(default_factory=Axis)
    rule: float | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Lane:
    """A row of marks below the panels, such as the jumps of an arm: made as ticks, refused as crosses."""

    name: str
    made: Sequence[float]
    refused: Sequence[float] = ()
    colour: str = "c1"


@dataclass(frozen=True)
class Lines(Chart):
    """Panels, one below the other, over one x axis; ``lanes`` below them."""

    panels: Sequence[Panel]
    x: Axis
    lanes: Sequence[Lane] = ()
    height: int = 300

    def keys(self) -> Mapping[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        for line in (line for panel in self.panels for line in panel.lines):
            found.setdefault(line.name, {"series": len(found), "colour": line.colour, "dashed": line.dashed})
        return found

    def paint(self, width: int) -> tuple[float, list[str]]:
        shown = [point for panel in self.panels for line in panel.lines for point in line.points()]
        lanes = [step for lane in self.lanes for step in (*lane.made, *lane.refused)]
        left = 8 + max(_room(panel.y, _values(panel)) for panel in self.panels)
        left = max(left, *(GLYPH * len(label(lane.name)) + 14 for lane in self.lanes)) if self.lanes else left
        across = Scale.of(self.x, [x for x, _ in shown] + lanes, left, width - 14)
        whole = self.height * (0.8 if width == NARROW else 1) - 30 * len(self.panels)
        keys, parts, top = self.keys(), list[str](), 0.0
        for panel in self.panels:
            top += 26
            bottom = top + whole * panel.share / sum(one.share for one in self.panels)
            parts += _panel(panel, across, (left, top, width - 14, bottom), keys)
            top = bottom + 4
        for lane in self.lanes:
            parts += _lane(lane, across, left, top + 3)
            top += 17
        ticks = across.ticks(max(2, int((width - left) / 80)))
        parts += [text(across(tick), top + 15, short(tick), anchor="middle") for tick in ticks]
        parts.append(text(width - 14, top + 33, self.x.label, anchor="end"))
        return top + 42, parts


def _values(panel: Panel) -> list[float]:
    return [value for line in panel.lines for value in (*line.y, *line.low, *line.high) if value is not None]


def _room(axis: Axis, values: Sequence[float]) -> float:
    """Return the width of an axis' numbers."""
    scale = Scale.of(axis, values, 0, 1)
    return GLYPH * max(len(short(tick)) for tick in scale.ticks(5) or [0.0])


def _panel(panel: Panel, across: Scale, box: tuple[float, float, float, float], keys: Mapping[str, Any]) -> list[str]:
    left, top, right, bottom = box
    up = Scale.of(panel.y, _values(panel), bottom, top)
    parts = [text(0, top - 9, panel.y.label)]
    for tick in up.ticks(max(2, int((bottom - top) / 36))):
        parts.append(path([(left, up(tick)), (right, up(tick))], "line", 1))
        parts.append(text(left - 6, up(tick) + 4, short(tick), anchor="end"))
    if panel.rule is not None and up.low <= panel.rule <= up.high:
        parts.append(path([(left, up(panel.rule)), (right, up(panel.rule))], "soft", 1.2))
    return parts + [_line(line, across, up, keys[line.name]["series"]) for line in panel.lines]


def _line(line: Line, across: Scale, up: Scale, series: int) -> str:
    """Return a group: band, line and points, with the values that a pointer shows."""
    points = [(across(x), up(y)) for x, y in line.points()]
    parts, hover = list[str](), list[list[Any]]()
    rows = zip(line.x, line.y, line.low or line.y, line.high or line.y, strict=True)
    known = [(x, y, low, high) for x, y, low, high in rows if x is not None and y is not None]
    if line.low:
        band = [(x, low, high) for x, _, low, high in known if low is not None and high is not None]
        edge = [(across(x), up(high)) for x, _, high in band] + [(across(x), up(low)) for x, low, _ in reversed(band)]
        parts += [f'<path d="M{joined(edge)}Z" fill="var(--{line.colour})" opacity=".16"/>'] if edge else []
    if line.joined and line.stepped:
        points = [part for at, (x, y) in enumerate(points) for part in ((x, points[at - 1][1] if at else y), (x, y))]
    if line.joined:
        parts.append(path(points, line.colour, 1.8, dashed=line.dashed))
    for x, y, low, high in known:
        between = f" ({short(low)} to {short(high)})" if line.low and low is not None and high is not None else ""
        hover.append([across(x), up(y), short(x), short(y) + between])
        if line.dots:
            parts.append(tag("circle", cx=across(x), cy=up(y), r=line.size, fill=f"var(--{line.colour})"))
    data = html.escape(json.dumps(hover, separators=(",", ":")))
    return f'<g class="s{series}" data-name="{html.escape(label(line.name))}" data-points="{data}">{"".join(parts)}</g>'


def _lane(lane: Lane, across: Scale, left: float, y: float) -> list[str]:
    middle = y + 6
    parts = [text(left - 6, middle + 4, label(lane.name), anchor="end")]
    made = "".join(f"M{across(step)} {y:g}v12" for step in lane.made)
    refused = "".join(f"M{across(step) - 3:g} {middle - 3:g}l6 6m0 -6l-6 6" for step in lane.refused)
    look = {"stroke": f"var(--{lane.colour})", "fill": "none"}
    return parts + [tag("path", d=d, stroke_width=width, **look) for d, width in ((made, 1.6), (refused, 1.2)) if d]

"""Charts as SVG text: lines over panels, rows with intervals, and maps of layers. Needs no package.

Colours are CSS variables, so that one chart serves a light and a dark page; a file or a notebook has the light ones.
"""

from __future__ import annotations

import html
import json
import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from next_core.errors import invalid_value
from next_core.storage.atomic import write_text

Values = Sequence[float | None]
Pairs = Sequence[tuple[float, float]]

NAMES = ("paper", "ink", "soft", "line", "walk", "c0", "c1", "c2", "c3", "c4", "c5")


def _palette(colours: str) -> dict[str, str]:
    return dict(zip(NAMES, colours.split(), strict=True))


LIGHT = _palette("#ffffff #1b1f24 #57606a #d5dae0 #8b949e #0072b2 #c44e00 #00815f #a9437e #946200 #6a51a3")
DARK = _palette("#12161b #e6e9ec #9ea7b1 #343b44 #8b949e #58b6ec #ff9256 #35c79a #e79ac6 #e8b339 #b7a5ff")
"""Okabe and Ito's hues, which colour-blind readers can tell apart, dark or light enough for thin lines."""
COLOURS = tuple(f"c{index}" for index in range(6))
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',Arial,sans-serif"
WIDTH, NARROW = 540, 360
"""Widths in pixels of a chart: half a page, and a phone."""
SIZE, GLYPH = 12, 7.0
"""Font size, and the width of a wide character."""
BELOW, NEUTRAL, ABOVE = (163, 65, 11), (238, 238, 234), (8, 81, 156)
"""Colours of -1, 0 and 1 in a map."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Axis:
    """What an axis shows; its ends come from the data where they are None."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False


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
class Dot:
    """A value in a row, with its interval and single seeds."""

    value: float
    ends: tuple[float, float] | None = None
    each: Sequence[float] = ()
    colour: str = "c0"


@dataclass(frozen=True)
class Chart:
    """A chart and its name, which becomes its file name."""

    name: str

    @abstractmethod
    def paint(self, width: int) -> tuple[float, list[str]]:
        """Return the height in pixels at a width, and the elements."""

    def keys(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the entries of the legend: each name's series number, colour and look."""
        return {}

    def svg(self, width: int = WIDTH, label: str | None = None) -> str:
        """Return an element of a page, where ``label`` says what it shows; or else a document of light colours."""
        height, parts = self.paint(width)
        top, legend = _legend(self.keys(), width) if label is None else (0.0, [])
        if label is None:
            parts = [_tag("rect", width="100%", height="100%", fill="var(--paper)"), *legend,
                     f'<g transform="translate(0 {top:g})">', *parts, "</g>"]  # fmt: skip
        about = f' role="img" aria-label="{html.escape(label)}"' if label else ""
        size = "" if label is not None else f' width="{width}" height="{height + top:g}"'
        text = (
            f'<svg xmlns="http://www.w3.org/2000/svg"{size} viewBox="0 0 {width} {height + top:g}"{about} '
            f'font-family="{FONT}" font-size="{SIZE}">{"".join(parts)}</svg>'
        )
        return text if label is not None else re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], text)

    def _repr_svg_(self) -> str:
        return self.svg()

    def write(self, folder: Path) -> Path:
        """Write the SVG atomically into ``folder``, which is created if missing. Return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.name}.svg", self.svg() + "\n")
        return folder / f"{self.name}.svg"


class Charts(dict[str, Chart]):
    """Charts by name; a notebook shows them all."""

    def _repr_html_(self) -> str:
        return "".join(f"<figure>{chart.svg()}</figure>" for chart in self.values())


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
        parts += [_text(across(tick), top + 15, _short(tick), anchor="middle") for tick in ticks]
        parts.append(_text(width - 14, top + 33, self.x.label, anchor="end"))
        return top + 42, parts


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
            parts.append(_path([(across(tick), top), (across(tick), bottom)], "line", 1))
            parts.append(_text(across(tick), bottom + 15, _short(tick), anchor="middle"))
        if across.low <= 0 <= across.high:
            parts.append(_path([(across(0), top), (across(0), bottom)], "soft", 1.2))
        for index, (name, dots) in enumerate(self.rows.items()):
            y = top + step * index + step / 2 + (7 if above else 0)
            x, anchor = (0.0, None) if above else (left - 10, "end")
            parts.append(_text(x, y - (16 if above else -4), label(name), anchor, fill="ink"))
            if (walk := self.walks.get(name)) is not None:
                ends, mean = [(across(walk[place]), y) for place in (0, 2)], across(walk[1])
                parts.append(_path(ends, "walk", 9, opacity=0.4) + _path([(mean, y - 6), (mean, y + 6)], "walk", 1.5))
            for place, dot in enumerate(dots):
                parts.append(_dot(dot, across, y + 7 * (place - (len(dots) - 1) / 2), name))
        parts.append(_text(width - 14, bottom + 33, self.x.label, anchor="end"))
        return bottom + 42, parts


@dataclass(frozen=True)
class Maps(Chart):
    """Maps of layers (columns) by kinds of matrices (rows), with one scale of colours from -1 to 1."""

    maps: Mapping[str, Mapping[tuple[int, str], float]]
    """By title: values by layer and kind."""

    def paint(self, width: int) -> tuple[float, list[str]]:
        places = [place for cells in self.maps.values() for place in cells]
        layers = sorted({layer for layer, _ in places})
        kinds = sorted({kind for _, kind in places}, key=_kind_order)
        left = 10 + GLYPH * max(len(label(kind)) for kind in kinds)
        side, top, parts = min(64.0, (width - left - 4) / len(layers)), 0.0, list[str]()
        for title, cells in self.maps.items():
            parts.append(_text(0, top + 16, title, fill="ink", bold=True))
            top += 26
            for row, kind in enumerate(kinds):
                parts.append(_text(left - 8, top + 22 * row + 15, label(kind), anchor="end"))
                found = ((column, cells.get((layer, kind))) for column, layer in enumerate(layers))
                parts += [_cell(left + side * x, top + 22 * row, side, value, f"layer {layers[x]}, {kind}")
                          for x, value in found if value is not None]  # fmt: skip
            top += 22 * len(kinds)
            every = math.ceil(GLYPH * (len(str(layers[-1])) + 1) / side)
            parts += [_text(left + side * (x + 0.5), top + 15, str(layer), anchor="middle")
                      for x, layer in enumerate(layers) if x % every == 0]  # fmt: skip
            top += 28
        parts.append(_text(left - 8, top + 2, "layer", anchor="end"))
        for index in range(41):  # the key of the colours
            fill, _ = _colours(index / 20 - 1)
            parts.append(_tag("rect", x=left + 4 * index, y=top + 8, width=4.2, height=10, fill=fill))
        parts += [_text(left + 82 * (end + 1), top + 32, str(end), anchor="middle") for end in (-1, 0, 1)]
        return top + 38, parts


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


def _values(panel: Panel) -> list[float]:
    return [value for line in panel.lines for value in (*line.y, *line.low, *line.high) if value is not None]


def _room(axis: Axis, values: Sequence[float]) -> float:
    """Return the width of an axis' numbers."""
    scale = Scale.of(axis, values, 0, 1)
    return GLYPH * max(len(_short(tick)) for tick in scale.ticks(5) or [0.0])


def _panel(panel: Panel, across: Scale, box: tuple[float, float, float, float], keys: Mapping[str, Any]) -> list[str]:
    left, top, right, bottom = box
    up = Scale.of(panel.y, _values(panel), bottom, top)
    parts = [_text(0, top - 9, panel.y.label)]
    for tick in up.ticks(max(2, int((bottom - top) / 36))):
        parts.append(_path([(left, up(tick)), (right, up(tick))], "line", 1))
        parts.append(_text(left - 6, up(tick) + 4, _short(tick), anchor="end"))
    if panel.rule is not None and up.low <= panel.rule <= up.high:
        parts.append(_path([(left, up(panel.rule)), (right, up(panel.rule))], "soft", 1.2))
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
        parts += [f'<path d="M{_joined(edge)}Z" fill="var(--{line.colour})" opacity=".16"/>'] if edge else []
    if line.joined and line.stepped:
        points = [part for at, (x, y) in enumerate(points) for part in ((x, points[at - 1][1] if at else y), (x, y))]
    if line.joined:
        parts.append(_path(points, line.colour, 1.8, dashed=line.dashed))
    for x, y, low, high in known:
        between = f" ({_short(low)} to {_short(high)})" if line.low and low is not None and high is not None else ""
        hover.append([across(x), up(y), _short(x), _short(y) + between])
        if line.dots:
            parts.append(_tag("circle", cx=across(x), cy=up(y), r=line.size, fill=f"var(--{line.colour})"))
    data = html.escape(json.dumps(hover, separators=(",", ":")))
    return f'<g class="s{series}" data-name="{html.escape(label(line.name))}" data-points="{data}">{"".join(parts)}</g>'


def _lane(lane: Lane, across: Scale, left: float, y: float) -> list[str]:
    middle = y + 6
    parts = [_text(left - 6, middle + 4, label(lane.name), anchor="end")]
    made = "".join(f"M{across(step)} {y:g}v12" for step in lane.made)
    refused = "".join(f"M{across(step) - 3:g} {middle - 3:g}l6 6m0 -6l-6 6" for step in lane.refused)
    look = {"stroke": f"var(--{lane.colour})", "fill": "none"}
    return parts + [_tag("path", d=d, stroke_width=width, **look) for d, width in ((made, 1.6), (refused, 1.2)) if d]


def _dot(dot: Dot, across: Scale, y: float, name: str) -> str:
    ends = "" if dot.ends is None else f" ({_short(dot.ends[0])} to {_short(dot.ends[1])})"
    parts = [f"<title>{html.escape(label(name))}: {_short(dot.value)}{ends}</title>"]
    parts += [_path([(across(one), y - 4), (across(one), y + 4)], dot.colour, 1, opacity=0.6) for one in dot.each]
    if dot.ends is not None:
        parts.append(_path([(across(end), y) for end in dot.ends], dot.colour, 2))
    parts.append(_tag("circle", cx=across(dot.value), cy=f"{y:g}", r=4, fill=f"var(--{dot.colour})"))
    return f"<g>{''.join(parts)}</g>"


def _cell(x: float, y: float, side: float, value: float, where: str) -> str:
    fill, ink = _colours(value)
    box = _tag("rect", x=f"{x:.1f}", y=y, width=f"{side - 1.5:.1f}", height=20.5, fill=fill)
    words = f"{value:.2f}".replace("-", "−") if side >= 36 else ""
    number = _text(x + side / 2, y + 14.5, words, anchor="middle", fill=ink)
    return f"<g><title>{html.escape(where)}: {value:.3f}</title>{box}{number}</g>"


def _colours(value: float) -> tuple[str, str]:
    """Return a colour between those of -1, 0 and 1, and black or white, whichever is easier to read on it."""
    share, end = min(abs(value), 1.0), ABOVE if value > 0 else BELOW
    rgb = [round(a + (b - a) * share) for a, b in zip(NEUTRAL, end, strict=True)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (part / 255 for part in rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#" + "".join(f"{part:02x}" for part in rgb), "#000" if luminance > 0.179 else "#fff"


def _legend(keys: Mapping[str, Mapping[str, Any]], width: int) -> tuple[float, list[str]]:
    """Return the height of a legend inside a file, and its elements."""
    parts, x, y = list[str](), 4.0, 14.0
    for name, look in keys.items():
        size = 34 + GLYPH * len(label(name))
        if x > 4 and x + size > width:
            x, y = 4.0, y + 18
        parts.append(_path([(x, y - 4), (x + 20, y - 4)], look["colour"], 2.4, dashed=look.get("dashed", False)))
        parts.append(_text(x + 26, y, label(name), fill="ink"))
        x += size + 10
    return (y + 6 if keys else 0.0), parts


def _joined(points: Pairs) -> str:
    return "L".join(f"{x:g} {y:g}" for x, y in points)


def _path(points: Pairs, colour: str, width: float, *, dashed: bool = False, opacity: float = 1.0) -> str:
    look = {"stroke_dasharray": "6 3"} if dashed else {}
    look |= {"opacity": f"{opacity:g}"} if opacity < 1 else {}
    return _tag("path", d=f"M{_joined(points)}", stroke=f"var(--{colour})", stroke_width=width, fill="none", **look)


def _tag(name: str, **attributes: Any) -> str:
    given = (f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name}{''.join(given)}/>"


def _text(x: float, y: float, text: str, anchor: str | None = None, fill: str = "soft", bold: bool = False) -> str:
    look = (f' text-anchor="{anchor}"' if anchor else "") + (' font-weight="600"' if bold else "")
    colour = fill if fill.startswith("#") else f"var(--{fill})"
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{look}>{html.escape(text)}</text>' if text else ""


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def _kind_order(kind: str) -> tuple[int, str]:
    return (KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER)), kind


KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The order of a transformer block; other kinds follow by name."""


def drawn_or_error(drawn: Chart | str) -> Chart:
    """Return a chart that was drawn. Raises ``ConfigError`` with the reason for one that was not."""
    if isinstance(drawn, str):
        raise invalid_value(f"this cannot be drawn: {drawn}")
    return drawn


def check_folder(folder: Path | None) -> None:
    """Raise ``ConfigError`` if ``folder`` is a file."""
    if folder is not None and folder.exists() and not folder.is_dir():
        raise invalid_value(f"{folder} is a file; name a folder for the plots")


def label(text: str, most: int = 28) -> str:
    """Return a name in one short line, without characters that XML cannot hold."""
    words = " ".join(CONTROL.sub(" ", text).split())
    return (words if len(words) <= most else f"{words[: most - 1]}…") or "(no name)"

"""Maps of layers by kinds of matrices, with one scale of colours."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

from next_core.drawing.chart import Chart
from next_core.drawing.elements import GLYPH, label, tag, text

BELOW, NEUTRAL, ABOVE = (163, 65, 11), (238, 238, 234), (8, 81, 156)  # Colours of -1, 0 and 1 in a map


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
            parts.append(text(0, top + 16, title, fill="ink", bold=True))
            top += 26
            for row, kind in enumerate(kinds):
                parts.append(text(left - 8, top + 22 * row + 15, label(kind), anchor="end"))
                found = ((column, cells.get((layer, kind))) for column, layer in enumerate(layers))
                parts += [_cell(left + side * x, top + 22 * row, side, value, f"layer {layers[x]}, {kind}")
                          for x, value in found if value is not None]  # fmt: skip
            top += 22 * len(kinds)
            every = math.ceil(GLYPH * (len(str(layers[-1])) + 1) / side)
            parts += [text(left + side * (x + 0.5), top + 15, str(layer), anchor="middle")
                      for x, layer in enumerate(layers) if x % every == 0]  # fmt: skip
            top += 28
        parts.append(text(left - 8, top + 2, "layer", anchor="end"))
        for index in range(41):  # the key of the colours
            fill, _ = _colours(index / 20 - 1)
            parts.append(tag("rect", x=left + 4 * index, y=top + 8, width=4.2, height=10, fill=fill))
        parts += [text(left + 82 * (end + 1), top + 32, str(end), anchor="middle") for end in (-1, 0, 1)]
        return top + 38, parts


def _cell(x: float, y: float, side: float, value: float, where: str) -> str:
    fill, ink = _colours(value)
    box = tag("rect", x=f"{x:.1f}", y=y, width=f"{side - 1.5:.1f}", height=20.5, fill=fill)
    words = f"{value:.2f}".replace("-", "−") if side >= 36 else ""
    number = text(x + side / 2, y + 14.5, words, anchor="middle", fill=ink)
    return f"<g><title>{html.escape(where)}: {value:.3f}</title>{box}{number}</g>"


def _colours(value: float) -> tuple[str, str]:
    """Return a colour between those of -1, 0 and 1, and black or white, whichever is easier to read on it."""
    share, end = min(abs(value), 1.0), ABOVE if value > 0 else BELOW
    rgb = [round(a + (b - a) * share) for a, b in zip(NEUTRAL, end, strict=True)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (part / 255 for part in rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#" + "".join(f"{part:02x}" for part in rgb), "#000" if luminance > 0.179 else "#fff"


def _kind_order(kind: str) -> tuple[int, str]:
    return (KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER)), kind


KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The order of a transformer block; other kinds follow by name."""

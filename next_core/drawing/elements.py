"""SVG elements as text: colours, paths, words and numbers.

Colours are CSS variables, so that one chart serves a light and a dark page.
"""

import html
import re
from collections.abc import Sequence
from typing import Any

Pairs = Sequence[tuple[float, float]]

NAMES = ("paper", "ink", "soft", "line", "walk", "c0", "c1", "c2", "c3", "c4", "c5")


def _palette(colours: str) -> dict[str, str]:
    return dict(zip(NAMES, colours.split(), strict=True))


LIGHT = _palette("#ffffff #1b1f24 #57606a #d5dae0 #8b949e #0072b2 #c44e00 #00815f #a9437e #946200 #6a51a3")
DARK = _palette("#12161b #e6e9ec #9ea7b1 #343b44 #8b949e #58b6ec #ff9256 #35c79a #e79ac6 #e8b339 #b7a5ff")
"""Okabe and Ito's hues, which colour-blind readers can tell apart, dark or light enough for thin lines."""
COLOURS = tuple(f"c{index}" for index in range(6))
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',Arial,sans-serif"
WIDTH, NARROW = 540, 360  # Widths in pixels of a chart: half a page, and a phone
SIZE, GLYPH = 12, 7.0  # Font size, and the width of a wide character
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def joined(points: Pairs) -> str:
    return "L".join(f"{x:g} {y:g}" for x, y in points)


def path(points: Pairs, colour: str, width: float, *, dashed: bool = False, opacity: float = 1.0) -> str:
    look = {"stroke_dasharray": "6 3"} if dashed else {}
    look |= {"opacity": f"{opacity:g}"} if opacity < 1 else {}
    return tag("path", d=f"M{joined(points)}", stroke=f"var(--{colour})", stroke_width=width, fill="none", **look)


def tag(name: str, **attributes: Any) -> str:
    given = (f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f"<{name}{''.join(given)}/>"


def text(x: float, y: float, text: str, anchor: str | None = None, fill: str = "soft", bold: bool = False) -> str:
    look = (f' text-anchor="{anchor}"' if anchor else "") + (' font-weight="600"' if bold else "")
    colour = fill if fill.startswith("#") else f"var(--{fill})"
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{look}>{html.escape(text)}</text>' if text else ""


def short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if abs(value) < 999.5 else f"{value:,.0f}".replace("-", "−")


def label(text: str, most: int = 28) -> str:
    """Return a name in one short line, without characters that XML cannot hold."""
    words = " ".join(CONTROL.sub(" ", text).split())
    return (words if len(words) <= most else f"{words[: most - 1]}…") or "(no name)"

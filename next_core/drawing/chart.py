"""What all charts are: a name, and SVG for a page, a notebook or a file. Needs no package."""

import html
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from next_core.drawing.elements import FONT, GLYPH, LIGHT, SIZE, WIDTH, label, path, tag, text
from next_core.errors import invalid_value
from next_core.storage.atomic import write_text


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
            parts = [tag("rect", width="100%", height="100%", fill="var(--paper)"), *legend,
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


def _legend(keys: Mapping[str, Mapping[str, Any]], width: int) -> tuple[float, list[str]]:
    parts, x, y = list[str](), 4.0, 14.0
    for name, look in keys.items():
        size = 34 + GLYPH * len(label(name))
        if x > 4 and x + size > width:
            x, y = 4.0, y + 18
        parts.append(path([(x, y - 4), (x + 20, y - 4)], look["colour"], 2.4, dashed=look.get("dashed", False)))
        parts.append(text(x + 26, y, label(name), fill="ink"))
        x += size + 10
    return (y + 6 if keys else 0.0), parts


def drawn_or_error(drawn: Chart | str) -> Chart:
    """Return a chart that was drawn. Raises ``ConfigError`` with the reason for one that was not."""
    if isinstance(drawn, str):
        raise invalid_value(f"this cannot be drawn: {drawn}")
    return drawn

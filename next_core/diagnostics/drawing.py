"""Plots in one style, as SVG text or as PNG and SVG files. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from next_core.errors import invalid_value
from next_core.process.optional_packages import import_optional
from next_core.storage.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's colours, which colour-blind readers can tell apart; nulls are grey.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"
COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHED = (0, (4, 2))
WALK: dict[str, Any] = {"color": GREY, "linewidth": 7, "alpha": 0.4}
"""The interval of a random walk in a plot of rows."""
WIDTH = 5.4
"""Width in inches at which a plot stays legible on a phone."""
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "svg.hashsalt": "next-core",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from users, and may contain $
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Drawing:
    """A drawn plot and its name, which becomes its file name."""

    name: str
    picture: Picture

    def svg(self) -> str:
        """Return an SVG document; the same data give the same bytes."""
        text = io.StringIO()
        self._save(text, "svg")
        return text.getvalue()

    _repr_svg_ = svg

    def write(self, folder: Path) -> Path:
        """Write PNG and SVG atomically into ``folder``, which is created if missing. Return the PNG's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            with atomic_file(folder / f"{self.name}.{kind}") as scratch:
                self._save(scratch, kind)
        return folder / f"{self.name}.png"

    def _save(self, target: Path | io.StringIO, kind: str) -> None:
        metadata = {"Date": None} if kind == "svg" else {}
        with _styled():
            self.picture.savefig(target, format=kind, dpi=160, metadata=metadata)


class Drawings(dict[str, Drawing]):
    """Plots by name; a notebook shows them all."""

    def _repr_html_(self) -> str:
        return "".join(f"<figure>{drawing.svg()}</figure>" for drawing in self.values())


def draw(name: str, size: tuple[float, float], paint: Callable[..., str | None], *facts: Any) -> Drawing | str:
    """Return a plot of ``size`` inches that ``paint(picture, *facts)`` fills, or the reason why it cannot."""
    from matplotlib.figure import Figure as Picture

    with _styled():
        picture = Picture(figsize=size, layout="constrained")
        reason = paint(picture, *facts)
    return Drawing(name, picture) if reason is None else reason


def drawn_or_error(drawn: Drawing | str) -> Drawing:
    """Return a plot that was drawn. Raises ``ConfigError`` with the reason for one that was not."""
    if isinstance(drawn, str):
        raise invalid_value(f"this cannot be drawn: {drawn}")
    return drawn


def check_drawing(folder: Path | None = None) -> None:
    """Raise ``ConfigError`` without matplotlib, or if ``folder`` is a file."""
    import_optional("matplotlib.figure", "report")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise invalid_value(f"{folder} is a file; name a folder for the plots")


Values = Sequence[float | None]


def add_line(
    axis: Axes, x: Values, value: Values, low: Values, high: Values, colour: str, *, band: float = 0.18, **look: Any
) -> None:
    """Plot a line, and a band of opacity ``band`` from ``low`` to ``high`` (empty: no band); None is a gap."""
    where, middle, below, above = ([math.nan if one is None else one for one in each] for each in (x, value, low, high))
    if below:
        axis.fill_between(where, below, above, color=colour, alpha=band, linewidth=0)
    axis.plot(where, middle, color=colour, **look)


def add_row(
    axis: Axes, row: float, value: float, ends: Sequence[float] | None, walk: Sequence[float] | None = None, **look: Any
) -> None:
    """Plot a value in a row, with its interval as a line, and that of a random walk as a grey bar behind it."""
    look = {"color": BLUE, "markersize": 5, **look}
    if walk is not None:
        axis.plot(walk, [row, row], **WALK, solid_capstyle="butt")
    if ends is not None:
        axis.plot(ends, [row, row], color=look["color"], linewidth=1.5)
    axis.plot([value], [row], "o", **look)


def label_rows(axis: Axes, names: Sequence[str], zero: str = "-") -> None:
    """Name the rows, the first one on top, and mark zero."""
    axis.axvline(0, color="black", linewidth=0.8, linestyle=zero)
    axis.set(ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), [label(name) for name in names])
    axis.tick_params(axis="y", length=0)


def add_grid(axis: Axes, along: Literal["x", "y"] = "y") -> None:
    """Draw a light grid behind the data."""
    axis.grid(axis=along, color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)


def add_legend(picture: Picture, entries: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Put a legend below the axes; ``entries`` are labels with the style of their lines, default: what was plotted."""
    from matplotlib.lines import Line2D

    given = (
        {} if entries is None else {"handles": [Line2D([], [], label=key, **style) for key, style in entries.items()]}
    )
    picture.legend(**given, loc="outside lower left", ncols=2, fontsize=8.5)


def label(text: str, most: int = 28) -> str:
    """Return a name in one short line, without characters that XML or a legend cannot hold."""
    words = " ".join(CONTROL.sub(" ", text).split())
    short = words if len(words) <= most else f"{words[: most - 1]}…"
    return f" {short}" if short.startswith("_") else short or "(no name)"


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # In an SVG the reader's own font has the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield

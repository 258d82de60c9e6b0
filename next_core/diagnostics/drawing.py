"""Figures in one style, as SVG text or as PNG and SVG files. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from next_core.errors import ConfigError, PluginError
from next_core.storage.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's colours, which colour-blind readers can tell apart; nulls are grey.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"
COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH = 5.4
"""Width in inches at which a figure stays legible on a phone."""
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
FORMATS = ("png", "svg")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Drawing:
    """A drawn figure and its name, which becomes its file name."""

    name: str
    picture: Picture

    def svg(self) -> str:
        """Return an SVG document; the same data give the same bytes."""
        text = io.StringIO()
        self._save(text, "svg")
        return text.getvalue()

    def _repr_svg_(self) -> str:
        return self.svg()

    def write(self, folder: Path) -> Path:
        """Write PNG and SVG atomically into ``folder``, which is created if missing. Return the PNG's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind in FORMATS:
            with atomic_file(folder / f"{self.name}.{kind}") as scratch:
                self._save(scratch, kind)
        return folder / f"{self.name}.png"

    def _save(self, target: Path | io.StringIO, kind: str) -> None:
        metadata = {"Date": None} if kind == "svg" else {}
        with _styled():
            self.picture.savefig(target, format=kind, dpi=160, metadata=metadata)


def draw(name: str, size: tuple[float, float], paint: Callable[..., str | None], *facts: Any) -> Drawing | str:
    """Return a figure of ``size`` inches that ``paint(picture, *facts)`` fills, or the reason why it cannot."""
    from matplotlib.figure import Figure as Picture

    with _styled():
        picture = Picture(figsize=size, layout="constrained")
        reason = paint(picture, *facts)
    return Drawing(name, picture) if reason is None else reason


def check_drawing(folder: Path | None = None) -> None:
    """Raise ``PluginError`` without matplotlib, ``ConfigError`` if ``folder`` is a file."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PluginError(
            f"plots need matplotlib ({error}); pip install next-core[report]", kind="config-missing-package"
        ) from error
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the plots", kind="config-invalid-value")


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

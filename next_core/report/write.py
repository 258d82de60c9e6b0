"""``write_report``: from a folder to a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from next_core.diagnostics.drawing import check_drawing
from next_core.errors import invalid_value
from next_core.report.compare_page import compare_page
from next_core.report.geometry import GeometryOptions, check_predictor
from next_core.report.inputs import Recorded, open_folder
from next_core.report.page import make_environment
from next_core.report.run_page import run_page
from next_core.storage.atomic import write_text
from next_core.types import Progress

REPORT = Path("report") / "index.html"
SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class WrittenReport:
    """The page, its summary, its plots as files, and what could not be made, with the reason."""

    kind: Literal["run", "comparison"]
    out: Path
    summary: Sequence[str]
    figures: Mapping[str, str]
    missing: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return vars(self) | {"out": str(self.out)}


def write_report(
    folder: Path,
    out: Path | None = None,
    figures: Path | None = None,
    settings: GeometryOptions | None = None,
    progress: Progress | None = None,
) -> WrittenReport:
    """Write the page of a run's or a comparison's folder atomically to ``out``, by default ``report/index.html`` in it.

    ``figures`` is a folder for each plot as PNG and SVG. Raises ``ConfigError`` for a folder that holds neither and for
    an ``out`` that does not end in .html and without the extra ``report``, ``CheckpointError`` for a damaged file,
    ``PluginError`` for an unknown predictor.
    """
    settings = settings or GeometryOptions()
    out = folder / REPORT if out is None else out
    if out.is_dir() or out.suffix.lower() not in SUFFIXES:
        raise invalid_value(f"--out must name a file that ends in .html (got {out})")
    make_environment()  # a missing package is an error before the work
    check_drawing(figures)
    found = open_folder(folder)
    title = folder.resolve().name
    kind: Literal["run", "comparison"] = "run" if isinstance(found, Recorded) else "comparison"
    if isinstance(found, Recorded):
        check_predictor(settings)
        page = run_page(found, title, settings, progress)
    else:
        page = compare_page(found, title)
    text = page.html()
    written: dict[str, str] = {}
    if figures is not None:
        for drawing in page.drawings.values():
            written[drawing.name] = str(drawing.write(figures))
            if progress is not None:
                progress("plots", len(written), len(page.drawings))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return WrittenReport(kind, out, page.summary, written, page.missing)

"""``write_report``: from a folder to a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from next_core.diagnostics.drawing import check_drawing
from next_core.errors import ConfigError
from next_core.report.compare_page import compare_page
from next_core.report.geometry import GeometryOptions, check_predictor
from next_core.report.inputs import Comparison, open_folder
from next_core.report.page import check_html
from next_core.report.run_page import run_page
from next_core.storage.atomic import write_text
from next_core.types import Progress

REPORT = Path("report") / "index.html"
PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Written:
    """What was made: the page, its summary, pictures as files, and what could not be made, with the reason."""

    kind: Literal["run", "comparison"]
    out: Path
    summary: Sequence[str]
    figures: Mapping[str, str]
    missing: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": self.kind,
            "out": str(self.out),
            "summary": list(self.summary),
            "figures": dict(self.figures),
            "missing": dict(self.missing),
        }


def write_report(
    folder: Path,
    out: Path | None = None,
    figures: Path | None = None,
    settings: GeometryOptions | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the page about a run's or a comparison's folder to ``out``, whole or not at all.

    ``out`` None is ``report/index.html`` in the folder; ``figures`` is a folder for each picture as PNG and SVG.
    Raises ``ConfigError`` for a folder that is neither and for an ``out`` that is no page, ``CheckpointError`` for a
    file that is damaged, ``PluginError`` without the extra ``report`` and for a predictor that is unknown.
    """
    chosen = GeometryOptions() if settings is None else settings
    page_file = folder / REPORT if out is None else out
    if page_file.is_dir() or page_file.suffix.lower() not in PAGES:
        raise ConfigError(f"{page_file} is not the name of a page; --out names a file that ends in .html")
    check_html()
    check_drawing(figures)
    found = open_folder(folder)
    name = folder.resolve().name
    if isinstance(found, Comparison):
        kind: Literal["run", "comparison"] = "comparison"
        page = compare_page(found, name)
    else:
        kind = "run"
        check_predictor(chosen)
        page = run_page(found, name, chosen, progress)
    drawings = list(page.drawings())
    text = page.html()
    page_file.parent.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for done, drawing in enumerate(drawings if figures is not None else (), start=1):
        assert figures is not None
        written[drawing.name] = str(drawing.write(figures))
        if progress is not None:
            progress("pictures", done, len(drawings))
    write_text(page_file, text)
    return Written(kind, page_file, page.summary, written, page.missing())

"""``write_report``: from one or more folders to a page."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from next_core.errors import ConfigError, invalid_value
from next_core.plugins import resolve_predictor
from next_core.report.compare_page import compare_page
from next_core.report.geometry import GeometryOptions
from next_core.report.inputs import Comparison, Recorded, open_folder
from next_core.report.page import Page, make_environment
from next_core.report.run_page import run_page, runs_page
from next_core.storage.atomic import check_can_be_folder, write_text
from next_core.types import Progress

REPORT = Path("report") / "index.html"
SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class WrittenReport:
    """The page, its summary, its charts as files, and what could not be made, with the reason."""

    kind: Literal["run", "comparison", "runs"]
    out: Path
    summary: Sequence[str]
    figures: Mapping[str, str]
    missing: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return vars(self) | {"out": str(self.out)}


def write_report(
    folder: Path | Sequence[Path],
    out: Path | None = None,
    figures: Path | None = None,
    settings: GeometryOptions | None = None,
    progress: Progress | None = None,
) -> WrittenReport:
    """Write the page of a run's or a comparison's folder atomically to ``out``; several runs are shown side by side.

    ``out`` is by default ``report/index.html`` in the folder, of several in the one that holds them all; ``figures`` is
    a folder for each chart as SVG. Raises ``ConfigError`` for a folder of neither, a wrong ``out`` and without jinja2,
    ``CheckpointError`` for a damaged file, ``PluginError`` for a predictor that is unknown or scales steps.
    """
    folders = [folder] if isinstance(folder, Path) else list(folder)
    settings = settings or GeometryOptions()
    shared = Path(os.path.commonpath([one.absolute() for one in folders])) if folders[1:] else folders[0]
    out = shared / REPORT if out is None else out
    if out.is_dir() or out.suffix.lower() not in SUFFIXES:
        raise invalid_value(f"--out must name a file that ends in .html (got {out})")
    make_environment()  # a missing package is an error before the work
    for place in (out.parent, figures or out.parent):
        check_can_be_folder(place)
    kind, page = _page(folders, settings, progress)
    text = page.html()
    written = {} if figures is None else {chart.name: str(chart.write(figures)) for chart in page.charts()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return WrittenReport(kind, out, page.summary, written, page.missing)


def _page(
    folders: Sequence[Path], settings: GeometryOptions, progress: Progress | None
) -> tuple[Literal["run", "comparison", "runs"], Page]:
    if len(folders) > 1:
        runs: dict[Path, Recorded] = {}
        for folder in folders:
            one, path = open_folder(folder), folder.resolve()
            if isinstance(one, Comparison):
                message = f"{folder} holds a comparison; give it a report of its own"
                raise ConfigError(message, kind="report-unknown-folder")
            if path in runs:
                raise ConfigError(f"{folder} is named twice; name each run once", kind="report-unknown-folder")
            runs[path] = one
        root = Path(os.path.commonpath(runs))
        return "runs", runs_page({str(path.relative_to(root)): run for path, run in runs.items()})
    found = open_folder(folders[0])
    if isinstance(found, Recorded):
        if settings.wanted:
            resolve_predictor(settings.predictor)  # a wrong one is an error before the work
        return "run", run_page(found, settings, progress)
    return "comparison", compare_page(found, folders[0].resolve().name)

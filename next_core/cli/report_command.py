"""`next-core report`."""

from __future__ import annotations

from pathlib import Path

from next_core.cli.console import make_console
from next_core.cli.progress import Bars


def report_command(
    folder: Path,
    *,
    out: Path | None = None,
    figures: Path | None = None,
    geometry: bool = True,
    predictor: str = "secant",
    backbone: Path | None = None,
    cache: Path | None = None,
    no_cache: bool = False,
    as_json: bool = False,
) -> None:
    """Read, draw, write; say where the page is and what it says."""
    from next_core.errors import ConfigError
    from next_core.history.delta_cache import DeltaCache, default_folder
    from next_core.report.geometry import GeometryOptions
    from next_core.report.write import write_report
    from next_core.storage.json_lines import json_text

    if no_cache and cache is not None:
        raise ConfigError("--cache and --no-cache contradict; leave one out")
    kept = None if no_cache else DeltaCache(cache or default_folder())
    with Bars() as bars:
        written = write_report(folder, out, figures, GeometryOptions(geometry, predictor, backbone, kept), bars)
    console = make_console(as_json=as_json)
    for sentence in written.summary:
        console.print(sentence)
    for what, why in written.missing.items():
        console.print(f"not in the report: {what}: {why}")
    if figures is not None:
        console.print(f"{len(written.figures)} pictures, PNG and SVG: {figures}")
    console.print(f"report: {written.out}")
    if as_json:
        print(json_text(written.as_dict()))

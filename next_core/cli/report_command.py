"""``next-core report``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from next_core.cli.console import Output, progress_bars
from next_core.cli.options import Backbone, CacheOptions, Json, Predictor, expand_options


@expand_options
def report(
    caching: CacheOptions,
    folders: Annotated[
        list[Path],
        Argument(metavar="FOLDER...", help="Folder of a run, of a comparison or of the TRL callback; or several runs"),
    ],
    out: Annotated[Path | None, Option(help="HTML file; default: report/index.html in the folder")] = None,
    figures: Annotated[Path | None, Option(help="Write each plot into this folder too, as SVG")] = None,
    geometry: Annotated[bool, Option("--geometry/--no-geometry", help="Whether to measure the checkpoints")] = True,
    predictor: Predictor = "secant",
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Write an HTML report of a run or a comparison, or of runs side by side (extra `report`).

    --predictor is the one scored by layer.
    """
    from next_core.report.geometry import GeometryOptions
    from next_core.report.write import write_report

    options = GeometryOptions(geometry, predictor, backbone, caching.open_cache())
    with progress_bars() as progress:
        written = write_report(folders, out, figures, options, progress)
    output = Output(as_json)
    for sentence in written.summary:
        output.print(sentence)
    for what, reason in written.missing.items():
        output.print(f"not in the report: {what}: {reason}")
    if figures is not None:
        output.print(f"{len(written.figures)} plots: {figures}")
    output.print(f"report: {written.out}")
    output.json(written.as_dict())

"""``next-core analyze``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from next_core.cli.console import Output, progress_bars
from next_core.cli.options import Json, RunOptions, expand_options, show_source, trouble
from next_core.errors import contradiction

if TYPE_CHECKING:
    from next_core.diagnostics import Analysis, Figure

COLUMNS = {
    "squared_energy_ratio_global": "s1²/Σs²",
    "c1_r2": "R2(c1~t)",
    "pinned_skill": "skill",
    "cosine_local": "cos",
    "msd_exponent": "MSD exp.",
    "speed_ratio": "speed",
}
"""Figures of the table by kind of matrix, with their headings; the JSON has all, and layers and matrices."""
ROOM_FOR_MEANINGS = 126  # Narrower consoles omit the column that explains each figure
MARKS = {"above": "↑", "below": "↓", None: ""}
MOST_FROZEN = 8


@expand_options
def analyze(
    run: RunOptions,
    horizon: Annotated[int | None, Option(help="RL steps ahead, out of sample; default: a third of the run")] = None,
    spectrum: Annotated[bool | None, Option(help="Compute all singular values; default: only of LoRA runs")] = None,
    draws: Annotated[int, Option(min=20, help="Number of random walks in each null distribution")] = 200,
    seed: Annotated[int, Option(min=0, help="Seed of the random walks")] = 0,
    plots: Annotated[Path | None, Option(help="Write each plot into this folder, as SVG")] = None,
    as_json: Json = False,
) -> None:
    """Measure how a run's weights move, and compare each figure with random walks."""
    from next_core.diagnostics import analyze, with_origin
    from next_core.notebook import RecordedRun

    if spectrum and run.compressor == "lanczos":
        raise contradiction("--compressor lanczos does not compute the spectrum; omit it or --spectrum")
    if plots is not None:
        from next_core.diagnostics.plots import write_plots
        from next_core.storage.atomic import check_can_be_folder

        check_can_be_folder(plots)  # before the work
    output = Output(as_json)
    source = run.source()
    facts = show_source(run, source, output)
    full = all(parameter.rank is not None for parameter in source.parameters) if spectrum is None else spectrum
    with progress_bars() as progress:
        history = run.history(with_origin(source), 1, progress, spectrum=full)
        history.jump_log = RecordedRun(source, run.checkpoints[0] if len(run.checkpoints) == 1 else None).jumps
        analysis = analyze(history, horizon=horizon, draws=draws, seed=seed)
    for note in [*analysis.notes[len(source.notes) :], *trouble(history)]:
        output.print(f"  note: {note}")
    _show(analysis, output)
    written = {} if plots is None else write_plots(analysis.draw(), plots)
    for name, outcome in written.items():
        output.print(f"plot {name}: {outcome}")
    output.json({**facts, **analysis.as_dict(), "plots": written})


def _show(analysis: Analysis, output: Output) -> None:
    output.print(
        f"{'evenly' if analysis.even else 'unevenly'} spaced, deltas count from step {analysis.origin}; "
        f"{len(analysis.matrices)} matrices changed, {len(analysis.frozen)} did not"
    )
    if analysis.matrices:
        ahead = "" if analysis.horizon is None else f"; out-of-sample figures: {analysis.horizon} steps ahead"
        title = f"All matrices: median and quartiles, against random walks with the same step lengths{ahead}"
        output.table(title, _overall(analysis, output.console.width >= ROOM_FOR_MEANINGS), words=("meaning",))
        output.table("By kind: median; ↑ above, ↓ below the random walk's 95%", _kinds(analysis))
    reasons: dict[str, list[str]] = {}
    for name, reason in analysis.missing.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        output.print(f"not measured: {', '.join(names)}: {reason}")
    output.list([f"frozen: {name}: {reason}" for name, reason in analysis.frozen.items()], MOST_FROZEN, "frozen")
    if analysis.precision is not None and analysis.precision.drowned:
        output.print(f"lost in rounding: {', '.join(analysis.precision.drowned[:MOST_FROZEN])}")
    output.print()
    for sentence in analysis.advice:
        output.print(f"- {sentence}")


def _overall(analysis: Analysis, explain: bool) -> Iterator[dict[str, str]]:
    from next_core.diagnostics.figures import FIGURES, number

    for name, figure in analysis.overall.figures.items():
        if figure.value is not None:
            null = figure.null
            yield {
                "figure": FIGURES[name].heading,
                "run": number(figure.value),
                "quartiles": "" if figure.quartiles is None else " to ".join(map(number, figure.quartiles)),
                "": MARKS[figure.outside],
                "random walk": "-" if null is None else number(null.mean),
                "95%": "" if null is None else f"{number(null.low)} to {number(null.high)}",
                **({"meaning": FIGURES[name].words} if explain else {}),
            }


def _kinds(analysis: Analysis) -> Iterator[dict[str, str]]:
    columns = {name: heading for name, heading in COLUMNS.items() if name not in analysis.missing}
    for kind, group in analysis.kinds.items():
        figures = {heading: _marked(group.figures.get(name)) for name, heading in columns.items()}
        yield {"kind": kind, "matrices": str(len(group.members)), **figures}


def _marked(figure: Figure | None) -> str:
    from next_core.diagnostics.figures import number

    return "-" if figure is None or figure.value is None else f"{number(figure.value)}{MARKS[figure.outside] or ' '}"

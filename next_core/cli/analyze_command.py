"""`next-core analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from next_core.cli.console import make_console
from next_core.cli.options import RunOptions, report
from next_core.cli.progress import Bars

if TYPE_CHECKING:
    from next_core.diagnostics import Analysis, Figure, Group

TABLES = ("layer", "kind", "matrix")
COLUMNS = {
    "squared_energy_ratio_global": "s1²/Σs²",
    "c1_r2": "R2(c1~t)",
    "pinned_skill": "skill",
    "cosine_local": "cos",
    "msd_exponent": "MSD exp.",
    "speed_ratio": "speed",
}
"""What the table of layers, kinds or matrices shows, and how it is headed; the other figures are in the JSON."""
WORDS_FROM = 126
"""A narrower table has no words beside the figures."""
MARKS = {"above": "↑", "below": "↓", None: ""}
MOST_FROZEN = 8


def analyze_command(
    run: RunOptions,
    *,
    horizon: int | None = None,
    by: str = "kind",
    spectrum: bool | None = None,
    draws: int = 200,
    seed: int = 0,
    plots: Path | None = None,
    as_json: bool = False,
) -> None:
    """Open and measure, show tables, draw ``plots``; ``spectrum`` None means: for LoRA runs only."""
    from next_core.diagnostics import analyze, with_origin
    from next_core.errors import ConfigError
    from next_core.storage.json_lines import json_text

    if by not in TABLES:
        raise ConfigError(f"--by is one of {', '.join(TABLES)} (got {by!r})")
    if spectrum and run.compressor == "lanczos":
        raise ConfigError("--compressor lanczos does not know the spectrum; leave it out, or leave out --spectrum")
    if plots is not None:
        from next_core.diagnostics.drawing import check_drawing
        from next_core.diagnostics.plots import write_plots

        check_drawing(plots)  # before the work, not after it
    console = make_console(as_json=as_json)
    source = run.source()
    facts = report(run, source, console)
    full = all(parameter.rank is not None for parameter in source.parameters) if spectrum is None else spectrum
    with Bars() as bars:
        history = run.history(with_origin(source), 1, bars, spectrum=full)
        history.jump_log = _tried(run.checkpoints)
        analysis = analyze(history, horizon=horizon, draws=draws, seed=seed)
    trouble = [] if history.cache_trouble is None else [history.cache_trouble]
    for note in [*analysis.notes[len(source.notes) :], *trouble]:
        console.print(f"  note: {note}")
    show(analysis, by, console)
    drawn = {} if plots is None else write_plots(analysis, plots)
    for name, told in drawn.items():
        console.print(f"plot {name}: {told}")
    if as_json:
        print(json_text({**facts, **analysis.as_dict(), "plots": drawn}))


def _tried(checkpoints: list[Path]) -> list[dict[str, Any]]:
    """The jumps that the journal of a run folder has; none for checkpoints that belong to no run of ours."""
    from next_core.cycle.journal import JOURNAL, read_journal, valid_jumps
    from next_core.sources.jumps import jump_places

    journals = [place.parent / JOURNAL for place in jump_places(checkpoints[0])] if len(checkpoints) == 1 else []
    return next((valid_jumps(read_journal(journal)) for journal in journals if journal.exists()), [])


def show(analysis: Analysis, by: str, console: Console) -> None:
    """What was read, all figures of all matrices, the chosen table, what is missing, and the advice."""
    console.print(
        f"{'evenly' if analysis.even else 'unevenly'} spaced, counted from step {analysis.origin}; "
        f"{len(analysis.matrices)} matrices move, {len(analysis.frozen)} do not"
    )
    if analysis.matrices:
        console.print(_overall(analysis, words=console.width >= WORDS_FROM))
        console.print(_table(analysis, by))
    for reason, figures in _by_reason(analysis).items():
        console.print(f"not measured: {', '.join(figures)}: {reason}")
    for name, reason in list(analysis.frozen.items())[:MOST_FROZEN]:
        console.print(f"frozen: {name}: {reason}")
    if len(analysis.frozen) > MOST_FROZEN:
        console.print(f"frozen: and {len(analysis.frozen) - MOST_FROZEN} more; --json names all")
    if analysis.precision is not None and analysis.precision.drowned:
        console.print(f"drowned in rounding: {', '.join(analysis.precision.drowned[:MOST_FROZEN])}")
    console.print()
    for sentence in analysis.advice:
        console.print(f"- {sentence}")


def _overall(analysis: Analysis, words: bool) -> Table:
    from next_core.diagnostics.analysis_results import FIGURES, number

    horizon = "" if analysis.horizon is None else f"; out of sample: {analysis.horizon} steps ahead"
    title = f"All matrices: median (quartiles), beside random walks with the same step lengths{horizon}"
    table = Table(title=title, header_style="bold", title_justify="left", box=None, pad_edge=False)
    for column, side in (("figure", "left"), ("run", "right"), ("quartiles", "right"), ("", "left")):
        table.add_column(column, justify="left" if side == "left" else "right", no_wrap=True)
    table.add_column("random walk", justify="right", no_wrap=True)
    table.add_column("95%", justify="right", no_wrap=True)
    if words:
        table.add_column("what it is", no_wrap=True)
    for name, figure in analysis.overall.figures.items():
        if figure.value is None:
            continue
        spread = "" if figure.quartiles is None else " to ".join(map(number, figure.quartiles))
        null = figure.null
        cells = (FIGURES[name].heading, number(figure.value), spread, MARKS[figure.outside])
        walk = ("-", "") if null is None else (number(null.mean), f"{number(null.low)} to {number(null.high)}")
        table.add_row(*cells, *walk, *([FIGURES[name].words] if words else []))
    return table


def _table(analysis: Analysis, by: str) -> Table:
    groups: dict[str, Group] = {
        "layer": {str(layer): group for layer, group in analysis.layers.items()},
        "kind": dict(analysis.kinds),
        "matrix": {_short(name): group for name, group in analysis.matrices.items()},
    }[by]
    columns = {name: heading for name, heading in COLUMNS.items() if name not in analysis.missing}
    title = f"By {by}: {'' if by == 'matrix' else 'median; '}↑ above, ↓ below the random walk's 95%"
    table = Table(title=title, header_style="bold", title_justify="left", box=None, pad_edge=False)
    table.add_column(by, overflow="fold")
    if by != "matrix":
        table.add_column("matrices", justify="right", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for label, group in groups.items():
        cells = (_marked(group.figures[name]) if name in group.figures else "-" for name in columns)
        table.add_row(label, *([] if by == "matrix" else [str(len(group.members))]), *cells)
    return table


def _short(name: str) -> str:
    """12.mlp.up_proj for model.layers.12.mlp.up_proj.weight: a narrow terminal has no room for the rest."""
    return name.removeprefix("model.layers.").removesuffix(".weight")


def _marked(figure: Figure) -> str:
    from next_core.diagnostics.analysis_results import number

    return "-" if figure.value is None else f"{number(figure.value)}{MARKS[figure.outside] or ' '}"


def _by_reason(analysis: Analysis) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in analysis.missing.items():
        found.setdefault(reason, []).append(name)
    return found

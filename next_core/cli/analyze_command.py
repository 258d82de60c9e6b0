"""``next-core analyze``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from next_core.cli.console import make_console, make_table, progress_bars, shorten
from next_core.cli.options import Json, RunOptions, expand_options, show_source
from next_core.errors import ConfigError
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.diagnostics import Analysis, Figure, Group

GROUPINGS = ("layer", "kind", "matrix")
COLUMNS = {
    "squared_energy_ratio_global": "s1²/Σs²",
    "c1_r2": "R2(c1~t)",
    "pinned_skill": "skill",
    "cosine_local": "cos",
    "msd_exponent": "MSD exp.",
    "speed_ratio": "speed",
}
"""Figures of the table by layer, kind or matrix, with their headings; the JSON has all figures."""
ROOM_FOR_MEANINGS = 126
"""Narrower consoles omit the column that explains each figure."""
MARKS = {"above": "↑", "below": "↓", None: ""}
MOST_FROZEN = 8


@expand_options
def analyze(
    run: RunOptions,
    horizon: Annotated[int | None, Option(help="RL steps ahead, out of sample; default: a third of the run")] = None,
    by: Annotated[str, Option(help="Rows of the second table: layer, kind or matrix")] = "kind",
    spectrum: Annotated[bool | None, Option(help="Compute all singular values; default: only of LoRA runs")] = None,
    draws: Annotated[int, Option(min=20, help="Number of random walks in each null distribution")] = 200,
    seed: Annotated[int, Option(min=0, help="Seed of the random walks")] = 0,
    plots: Annotated[Path | None, Option(help="Write plots into this folder (extra `report`)")] = None,
    as_json: Json = False,
) -> None:
    """Measure how a run's weights move, and compare each figure with random walks."""
    from next_core.diagnostics import analyze, with_origin
    from next_core.notebook import RecordedRun

    if by not in GROUPINGS:
        raise ConfigError(f"--by must be one of {', '.join(GROUPINGS)} (got {by!r})", kind="config-invalid-value")
    if spectrum and run.compressor == "lanczos":
        raise ConfigError(
            "--compressor lanczos does not compute the spectrum; omit it or --spectrum", kind="config-contradiction"
        )
    if plots is not None:
        from next_core.diagnostics.drawing import check_drawing
        from next_core.diagnostics.plots import write_plots

        check_drawing(plots)  # before the work
    console = make_console(as_json=as_json)
    source = run.source()
    facts = show_source(run, source, console)
    full = all(parameter.rank is not None for parameter in source.parameters) if spectrum is None else spectrum
    with progress_bars() as progress:
        history = run.history(with_origin(source), 1, progress, spectrum=full)
        history.jump_log = RecordedRun(source, run.checkpoints[0] if len(run.checkpoints) == 1 else None).jumps
        analysis = analyze(history, horizon=horizon, draws=draws, seed=seed)
    trouble = [] if history.cache_trouble is None else [history.cache_trouble]
    for note in [*analysis.notes[len(source.notes) :], *trouble]:
        console.print(f"  note: {note}")
    _show(analysis, by, console)
    written = {} if plots is None else write_plots(analysis.draw(), plots)
    for name, outcome in written.items():
        console.print(f"plot {name}: {outcome}")
    if as_json:
        print(json_text({**facts, **analysis.as_dict(), "plots": written}))


def _show(analysis: Analysis, by: str, console: Console) -> None:
    console.print(
        f"{'evenly' if analysis.even else 'unevenly'} spaced, deltas count from step {analysis.origin}; "
        f"{len(analysis.matrices)} matrices changed, {len(analysis.frozen)} did not"
    )
    if analysis.matrices:
        console.print(_overall(analysis, explain=console.width >= ROOM_FOR_MEANINGS))
        console.print(_grouped(analysis, by))
    reasons: dict[str, list[str]] = {}
    for name, reason in analysis.missing.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"not measured: {', '.join(names)}: {reason}")
    frozen = [f"frozen: {name}: {reason}" for name, reason in analysis.frozen.items()]
    for line in shorten(frozen, MOST_FROZEN, "frozen"):
        console.print(line)
    if analysis.precision is not None and analysis.precision.drowned:
        console.print(f"lost in rounding: {', '.join(analysis.precision.drowned[:MOST_FROZEN])}")
    console.print()
    for sentence in analysis.advice:
        console.print(f"- {sentence}")


def _overall(analysis: Analysis, *, explain: bool) -> Table:
    """Return one row for each figure, over all matrices."""
    from next_core.diagnostics.figures import FIGURES, number

    def rows() -> Iterator[list[str]]:
        for name, figure in analysis.overall.figures.items():
            if figure.value is None:
                continue
            spread = "" if figure.quartiles is None else " to ".join(map(number, figure.quartiles))
            null = figure.null
            walk = ("-", "") if null is None else (number(null.mean), f"{number(null.low)} to {number(null.high)}")
            row = [FIGURES[name].heading, number(figure.value), spread, MARKS[figure.outside], *walk]
            yield [*row, FIGURES[name].words] if explain else row

    ahead = "" if analysis.horizon is None else f"; out-of-sample figures: {analysis.horizon} steps ahead"
    title = f"All matrices: median and quartiles, against random walks with the same step lengths{ahead}"
    headings = ["figure", "run", "quartiles", "", "random walk", "95%", *(["meaning"] if explain else [])]
    return make_table(title, headings, rows(), text=("figure", "meaning"))


def _grouped(analysis: Analysis, by: str) -> Table:
    """Return one row for each layer, kind or matrix."""
    columns = {name: heading for name, heading in COLUMNS.items() if name not in analysis.missing}
    title = f"By {by}: {'' if by == 'matrix' else 'median; '}↑ above, ↓ below the random walk's 95%"
    groups: dict[str, Group] = {
        "layer": {str(layer): group for layer, group in analysis.layers.items()},
        "kind": dict(analysis.kinds),
        "matrix": {_short(name): group for name, group in analysis.matrices.items()},
    }[by]
    count = [] if by == "matrix" else ["matrices"]
    rows = (
        [label, *(str(len(group.members)) for _ in count), *(_marked(group.figures.get(name)) for name in columns)]
        for label, group in groups.items()
    )
    return make_table(title, [by, *count, *columns.values()], rows, text=(by,))


def _short(name: str) -> str:
    """Return 12.mlp.up_proj for model.layers.12.mlp.up_proj.weight, to fit a narrow terminal."""
    return name.removeprefix("model.layers.").removesuffix(".weight")


def _marked(figure: Figure | None) -> str:
    from next_core.diagnostics.figures import number

    return "-" if figure is None or figure.value is None else f"{number(figure.value)}{MARKS[figure.outside] or ' '}"

"""`next-core backtest`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from next_core.cli.console import make_console
from next_core.cli.options import RunOptions, report
from next_core.cli.progress import Bars

if TYPE_CHECKING:
    from next_core.diagnostics.backtest_results import Backtest, Judged

MOST_FAILURES = 8
COLUMNS = ("skill", "95%", "", "null", "null's 95%", "error", "cosine", "norm", "lambda*", "damped", "acted", "s")


def backtest_command(
    run: RunOptions,
    *,
    predictors: str | None = None,
    horizon: int | None = None,
    cuts: int | None = None,
    draws: int = 5,
    seed: int = 0,
    rank: int = 1,
    fields: list[str] | None = None,
    as_json: bool = False,
) -> None:
    """Open, replay, show a table, the best first."""
    from next_core.diagnostics.backtest import backtest
    from next_core.storage.json_lines import json_text

    chosen = parse_predictors(predictors, fields or [])
    console = make_console(as_json=as_json)
    source = run.source()
    facts = report(run, source, console)
    with Bars() as bars:
        history = run.history(source, rank)
        found = backtest(history, chosen, horizon=horizon, cuts=cuts, draws=draws, seed=seed, progress=bars)
    notes = [*found.notes, *([] if history.cache_trouble is None else [history.cache_trouble])]
    show(found, notes, console)
    if as_json:
        print(json_text({**facts, **found.as_dict(), "rank": rank, "notes": [*source.notes, *notes]}))


def parse_predictors(predictors: str | None, fields: list[str]) -> dict[str, dict[str, Any]] | None:
    """Names and ``name.key=value`` as predictors with their fields; None where nothing was asked for.

    Raises ``ConfigError`` for fields of a predictor that is not judged.
    """
    from next_core.config import parse_assignments
    from next_core.diagnostics.backtest import BASELINES, default_predictors
    from next_core.errors import ConfigError
    from next_core.plugins import registry

    given = parse_assignments(fields)
    if predictors == "all":
        names = registry().names("predictor")
    elif predictors is not None:
        names = [name.strip() for name in predictors.split(",") if name.strip()]
    elif given:  # beside what is judged anyway
        names = [*default_predictors()[0], *given]
    else:
        return None
    chosen: dict[str, dict[str, Any]] = {name: {} for name in dict.fromkeys([*BASELINES, *names])}
    for name, values in given.items():
        if not isinstance(values, dict):
            raise ConfigError(f"--set {name}={values}: name the predictor, as in secant.window=10")
        if name not in chosen:
            raise ConfigError(f"--set {name}.{next(iter(values))}: '{name}' is not judged; add it to --predictors")
        chosen[name] = values
    return chosen


def show(found: Backtest, notes: list[str], console: Console) -> None:
    """What was replayed, the table, what failed, and the verdict."""
    cuts = found.cuts
    overlap = f"blocks of {found.block} for the intervals" if found.block > 1 else "which do not overlap"
    console.print(
        f"{found.horizon} steps ahead of {len(cuts)} cuts (steps {cuts[0]} to {cuts[-1]}, {overlap}), "
        f"{found.matrices} matrices, {found.draws} random walks; {found.shared_seconds:.1f} s for what all share"
    )
    for note in notes:
        console.print(f"  note: {note}")
    console.print(_table(found))
    for judged in found.predictors.values():
        for failure in judged.failures[:MOST_FAILURES]:
            console.print(f"failed: {judged.name} at step {failure.cut}: {failure.reason}")
        if len(judged.failures) > MOST_FAILURES:
            console.print(f"failed: {judged.name}: {len(judged.failures) - MOST_FAILURES} cuts more; --json has all")
        if not judged.acted and judged.reasons and judged.name != "stay":
            console.print(f"abstained: {judged.name}: {next(iter(judged.reasons))}")
    useful = [judged.name for judged in found.predictors.values() if judged.useful]
    console.print()
    console.print(f"Better than staying and than its random walks: {', '.join(useful) or 'none'}")


def _table(found: Backtest) -> Table:
    title = "Skill against staying put, ↑ above and ↓ below the same on random walks; a * on what beats both"
    table = Table(title=title, header_style="bold", title_justify="left", box=None, pad_edge=False)
    table.add_column("predictor", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for judged in found.predictors.values():
        table.add_row(f"{judged.name}{' *' if judged.useful else ''}", *_cells(judged, len(found.cuts)))
    return table


def _cells(judged: Judged, cuts: int) -> list[str]:
    from next_core.diagnostics.analysis_results import number

    def text(value: float | None) -> str:
        return "-" if value is None else number(value)

    score, null = judged.score, judged.null
    mark = "" if null is None or score.skill is None else "↑" if judged.above_null else "↓" * (score.skill < null.low)
    return [
        text(score.skill),
        "-" if judged.interval is None else " to ".join(map(number, judged.interval)),
        mark,
        "-" if null is None else number(null.mean),
        "-" if null is None else f"{number(null.low)} to {number(null.high)}",
        *map(text, (score.rel_error, score.cosine, score.norm_ratio, score.best_lambda, score.damped_skill)),
        f"{judged.acted}/{cuts}",
        f"{judged.seconds:.2g}",
    ]

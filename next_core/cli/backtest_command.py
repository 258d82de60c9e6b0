"""``next-core backtest``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Option

from next_core.cli.console import make_console, make_table, progress_bars, shorten
from next_core.cli.options import Json, Rank, RunOptions, allow_local_modules, expand_options, show_source
from next_core.errors import ConfigError
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.diagnostics.backtest_results import Backtest, Judged

MOST_FAILURES = 8
COLUMNS = ("skill", "95%", "", "random walk", "its 95%", "error", "cosine", "norm", "lambda*", "damped", "acted", "s")


@expand_options
def backtest(
    run: RunOptions,
    predictors: Annotated[
        str | None,
        Option(callback=allow_local_modules, metavar="all|A,B,...", help="Default: all that train no network"),
    ] = None,
    horizon: Annotated[int | None, Option(help="RL steps ahead; default: the one with the most cuts")] = None,
    cuts: Annotated[int | None, Option(help="Number of steps to predict from; default: all that fit")] = None,
    draws: Annotated[int, Option(help="Number of random walks to repeat the backtest on; 0: no null")] = 5,
    seed: Annotated[int, Option(min=0, help="Seed of the random walks and of the intervals")] = 0,
    rank: Rank = 1,
    settings: Annotated[
        list[str] | None, Option("--set", metavar="NAME.KEY=VALUE", help="A predictor's setting: secant.window=25")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score predictors on a recorded run by walk-forward backtest, and on random walks; train nothing."""
    from next_core.diagnostics.backtest import backtest

    chosen = parse_predictors(predictors, settings or [])
    console = make_console(as_json=as_json)
    source = run.source()
    facts = show_source(run, source, console)
    with progress_bars() as progress:
        history = run.history(source, rank)
        found = backtest(history, chosen, horizon=horizon, cuts=cuts, draws=draws, seed=seed, progress=progress)
    notes = [*found.notes, *([] if history.cache_trouble is None else [history.cache_trouble])]
    _show(found, notes, console)
    if as_json:
        print(json_text({**facts, **found.as_dict(), "rank": rank, "notes": [*source.notes, *notes]}))


def parse_predictors(predictors: str | None, settings: list[str]) -> dict[str, dict[str, Any]] | None:
    """Return the settings of each predictor to score, by name; None for the default ones.

    Raises ``ConfigError`` for settings of a predictor that is not scored.
    """
    from next_core.config import parse_assignments
    from next_core.diagnostics.backtest import BASELINES, default_predictors
    from next_core.plugins import registry

    given = parse_assignments(settings)
    if predictors == "all":
        names = registry().names("predictor")
    elif predictors is not None:
        names = [name.strip() for name in predictors.split(",") if name.strip()]
    elif given:
        names = [*default_predictors()[0], *given]
    else:
        return None
    chosen: dict[str, dict[str, Any]] = {name: {} for name in dict.fromkeys([*BASELINES, *names])}
    for name, values in given.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"--set {name}={values}: name the predictor, as in secant.window=10", kind="config-invalid-value"
            )
        if name not in chosen:
            raise ConfigError(
                f"--set {name}.{next(iter(values))}: '{name}' is not scored; add it to --predictors",
                kind="config-contradiction",
            )
        chosen[name] = values
    return chosen


def _show(found: Backtest, notes: list[str], console: Console) -> None:
    cuts = found.cuts
    overlap = f"overlapping in blocks of {found.block}" if found.block > 1 else "not overlapping"
    console.print(
        f"{found.horizon} steps ahead from {len(cuts)} cuts (steps {cuts[0]} to {cuts[-1]}, {overlap}), "
        f"{found.matrices} matrices, {found.draws} random walks; {found.shared_seconds:.1f} s of shared work"
    )
    for note in notes:
        console.print(f"  note: {note}")
    title = "Skill relative to no jump; ↑ above, ↓ below the skill on random walks; * beats both"
    rows = (
        [f"{judged.name}{' *' if judged.useful else ''}", *_cells(judged, len(cuts))]
        for judged in found.predictors.values()
    )
    console.print(make_table(title, ["predictor", *COLUMNS], rows, text=("predictor",)))
    for judged in found.predictors.values():
        failures = [f"failed: {judged.name} at step {failure.cut}: {failure.reason}" for failure in judged.failures]
        for line in shorten(failures, MOST_FAILURES, f"failed: {judged.name}"):
            console.print(line)
        if not judged.acted and judged.reasons and judged.name != "stay":
            console.print(f"abstained: {judged.name}: {next(iter(judged.reasons))}")
    useful = [judged.name for judged in found.predictors.values() if judged.useful]
    console.print()
    console.print(f"Better than no jump and than on random walks: {', '.join(useful) or 'none'}")


def _cells(judged: Judged, cuts: int) -> list[str]:
    from next_core.diagnostics.figures import number

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

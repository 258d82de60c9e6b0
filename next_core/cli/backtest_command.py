"""``next-core backtest``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from next_core.cli.console import Output, progress_bars
from next_core.cli.options import Json, Rank, RunOptions, allow_local_modules, expand_options, show_source, trouble
from next_core.errors import contradiction, invalid_value

if TYPE_CHECKING:
    from next_core.diagnostics.backtest_results import Backtest, Judged

MOST_FAILURES = 8


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
    output = Output(as_json)
    source = run.source()
    facts = show_source(run, source, output)
    with progress_bars() as progress:
        history = run.history(source, rank)
        found = backtest(history, chosen, horizon=horizon, cuts=cuts, draws=draws, seed=seed, progress=progress)
    notes = [*found.notes, *trouble(history)]
    _show(found, notes, output)
    output.json({**facts, **found.as_dict(), "rank": rank, "notes": [*source.notes, *notes]})


def parse_predictors(predictors: str | None, settings: list[str]) -> dict[str, dict[str, Any]] | None:
    """Return each predictor's settings, None for the default ones. ``ConfigError`` for those of one not scored."""
    from next_core.config import parse_assignments
    from next_core.diagnostics.backtest import BASELINES, default_predictors
    from next_core.plugins import trajectory_predictors

    given = parse_assignments(settings)
    if predictors == "all":
        names = trajectory_predictors()[0]
    elif predictors is not None:
        names = [name.strip() for name in predictors.split(",") if name.strip()]
        if not names:
            raise invalid_value("--predictors is empty; name predictors, all, or omit it")
    elif given:
        names = [*default_predictors()[0], *given]
    else:
        return None
    chosen: dict[str, dict[str, Any]] = {name: {} for name in dict.fromkeys([*BASELINES, *names])}
    for name, values in given.items():
        if not isinstance(values, dict):
            raise invalid_value(f"--set {name}={values}: name the predictor, as in secant.window=10")
        if name not in chosen:
            key = next(iter(values), "KEY")
            raise contradiction(f"--set {name}.{key}: '{name}' is not scored; add it to --predictors")
        chosen[name] = values
    return chosen


def _show(found: Backtest, notes: list[str], output: Output) -> None:
    cuts = found.cuts
    overlap = f"overlapping in blocks of {found.block}" if found.block > 1 else "not overlapping"
    output.print(
        f"{found.horizon} steps ahead from {len(cuts)} cuts (steps {cuts[0]} to {cuts[-1]}, {overlap}), "
        f"{found.matrices} matrices, {found.draws} random walks; {found.shared_seconds:.1f} s of shared work"
    )
    for note in notes:
        output.print(f"  note: {note}")
    title = "Skill relative to no jump; ↑ above, ↓ below the skill on random walks; * beats both"
    output.table(title, (_row(judged, len(cuts)) for judged in found.predictors.values()))
    for judged in found.predictors.values():
        failures = [f"failed: {judged.name} at step {failure.cut}: {failure.reason}" for failure in judged.failures]
        output.list(failures, MOST_FAILURES, f"failed: {judged.name}")
        if not judged.acted and judged.reasons and judged.name != "stay":
            output.print(f"abstained: {judged.name}: {next(iter(judged.reasons))}")
    useful = [judged.name for judged in found.predictors.values() if judged.useful]
    output.print()
    output.print(f"Better than no jump and than on random walks: {', '.join(useful) or 'none'}")


def _row(judged: Judged, cuts: int) -> dict[str, str]:
    from next_core.diagnostics.figures import number

    def text(value: float | None) -> str:
        return "-" if value is None else number(value)

    score, null = judged.score, judged.null
    below = null is not None and score.skill is not None and score.skill < null.low
    return {
        "predictor": f"{judged.name}{' *' if judged.useful else ''}",
        "skill": text(score.skill),
        "95%": "-" if judged.interval is None else " to ".join(map(number, judged.interval)),
        "": "↑" if judged.above_null else "↓" * below,
        "random walk": "-" if null is None else number(null.mean),
        "its 95%": "-" if null is None else f"{number(null.low)} to {number(null.high)}",
        "error": text(score.rel_error),
        "cosine": text(score.cosine),
        "norm": text(score.norm_ratio),
        "lambda*": text(score.best_lambda),
        "damped": text(score.damped_skill),
        "acted": f"{judged.acted}/{cuts}",
        "s": f"{judged.seconds:.2g}",
    }

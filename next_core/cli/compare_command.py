"""``next-core compare``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from next_core.cli.console import Output, progress_bars
from next_core.cli.options import Json
from next_core.process.quiet import quiet_libraries

if TYPE_CHECKING:
    from next_core.comparison.comparison_config import Arm
    from next_core.comparison.comparison_results import Bounds, Comparison
    from next_core.comparison.races import RacePlan


def compare(
    config: Annotated[Path, Argument(help="YAML file of the comparison; see docs/compare.md")],
    out: Annotated[Path, Option(help="Folder of the results. Run the command again to resume")] = Path("runs/compare"),
    workers: Annotated[int, Option(min=1, help="Number of runs at a time, each in its own process")] = 1,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the runs in --out and start over")] = False,
    keep_checkpoints: Annotated[bool, Option("--keep-checkpoints", help="Keep every run's checkpoints")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the config and list the runs; train nothing")] = False,
    as_json: Json = False,
) -> None:
    """Compare predictors with plain RL and with controls: same trainer, same budget, paired seeds."""
    from next_core.comparison import compare, load_comparison
    from next_core.comparison.execution import COMPARE, check_folder, is_done
    from next_core.comparison.races import make_plan

    settings, arms = load_comparison(config)
    plan = make_plan(settings, arms)
    check_folder(out, plan, overwrite)
    output = Output(as_json)
    done = sum(is_done(race, out) for race in plan.races)
    _show_plan(plan, arms, len(settings.seeds), done, output)
    if dry_run:
        folders = {race.title: str(out / race.folder) for race in plan.races}
        counts = {"races": len(plan.races), "done": done, "steps": plan.steps, "shared": plan.shared}
        output.json({**counts, "folders": folders})
        return
    quiet_libraries()
    options: dict[str, Any] = {"overwrite": overwrite, "workers": workers, "keep_checkpoints": keep_checkpoints}
    with progress_bars() as progress:
        found = compare(settings, arms, out, progress=progress, **options)
    _show(found, output)
    output.print(f"Figures: {out / COMPARE}; for an HTML report: next-core report {out}")
    output.json(found.as_dict())


def _show_plan(plan: RacePlan, arms: list[Arm], seeds: int, done: int, output: Output) -> None:
    output.print(
        f"{len(arms)} arms x {seeds} seed{'s' * (seeds > 1)}: {len(plan.races)} runs, {plan.steps} RL steps "
        f"({plan.shared} more are saved by shared prefixes); {done} runs are finished."
    )
    for arm in arms:
        values = [_values(variant.values) for variant in arm.variants if variant.values]
        chosen = f"; best of {' | '.join(values)} on the validation prompts" if values else ""
        output.print(f"  {arm.name} ({arm.role}): {arm.variants[0].config.predictor.name}{chosen}")


def _show(found: Comparison, output: Output) -> None:
    def rows() -> Iterator[dict[str, str]]:
        for name, arm in found.arms.items():
            beyond = "≥ " if arm.beyond else ""
            yield {
                "arm": name,
                "steps": str(arm.steps),
                found.metric: _interval(arm.test[found.metric], ".3f"),
                "vs plain": _interval(arm.difference, "+.3f"),
                "plain steps": beyond + _mean(arm.equals_step, ".0f"),
                "steps saved": beyond + _mean(arm.steps_saved, "+.0f"),
                "seconds saved": beyond + _mean(arm.seconds_saved, "+.1f"),
                "ICER": _mean(arm.icer, ".1f"),
                "steps spent": str(arm.spent_steps),
            }

    seeds = f"{len(found.seeds)} seed{'s' * (len(found.seeds) > 1)}"
    output.print()
    output.table(f"Accuracy ({found.metric}) on the test prompts: mean over {seeds}, 95% intervals", rows())
    for run, reason in found.failed.items():
        output.print(f"failed and excluded: {run}: {reason}")
    for name, arm in found.arms.items():
        if arm.chosen:
            output.print(f"{name}: {_values(arm.chosen)} was the best of {len(arm.variants)} on the validation prompts")


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _mean(figure: Bounds | None, form: str) -> str:
    return "-" if figure is None else format(figure.mean, form)


def _interval(figure: Bounds | None, form: str) -> str:
    half = "" if figure is None or figure.low is None else f" ±{figure.mean - figure.low:.3f}"
    return _mean(figure, form) + half

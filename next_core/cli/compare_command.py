"""``next-core compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Argument, Option

from next_core.cli.console import make_console, make_table, progress_bars
from next_core.cli.options import Json
from next_core.process.quiet import quiet_libraries
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.comparison.comparison_config import Arm
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
    console = make_console(as_json=as_json)
    done = sum(is_done(race, out) for race in plan.races)
    _show_plan(plan, arms, len(settings.seeds), done, console)
    if dry_run:
        if as_json:
            folders = {race.title: str(out / race.folder) for race in plan.races}
            counts = {"races": len(plan.races), "done": done, "steps": plan.steps, "shared": plan.shared}
            print(json_text({**counts, "folders": folders}))
        return
    quiet_libraries()
    options: dict[str, Any] = {"overwrite": overwrite, "workers": workers, "keep_checkpoints": keep_checkpoints}
    with progress_bars() as progress:
        found = compare(settings, arms, out, progress=progress, **options).as_dict()
    _show(found, console)
    console.print(f"Figures: {out / COMPARE}; for an HTML report: next-core report {out}")
    if as_json:
        print(json_text(found))


def _show_plan(plan: RacePlan, arms: list[Arm], seeds: int, done: int, console: Console) -> None:
    console.print(
        f"{len(arms)} arms x {seeds} seed{'s' * (seeds > 1)}: {len(plan.races)} runs, {plan.steps} RL steps "
        f"({plan.shared} more are saved by shared prefixes); {done} runs are finished."
    )
    for arm in arms:
        values = [", ".join(f"{key} {value}" for key, value in v.values.items()) for v in arm.variants if v.values]
        chosen = f"; best of {' | '.join(values)} on the validation prompts" if values else ""
        console.print(f"  {arm.name} ({arm.role}): {arm.variants[0].config.predictor.name}{chosen}")


def _show(found: dict[str, Any], console: Console) -> None:
    metric, seeds = found["metric"], len(found["seeds"])
    rows = []
    for name, arm in found["arms"].items():
        beyond = "≥ " if arm["beyond"] else ""
        rows.append(
            [
                name,
                str(arm["steps"]),
                _interval(arm["test"][metric], ".3f"),
                _interval(arm["difference"], "+.3f"),
                beyond + _mean(arm["equals_step"], ".0f"),
                beyond + _mean(arm["steps_saved"], "+.0f"),
                beyond + _mean(arm["seconds_saved"], "+.1f"),
                _mean(arm["icer"], ".1f"),
                str(arm["spent_steps"]),
            ]
        )
    title = f"Accuracy ({metric}) on the test prompts: mean over {seeds} seed{'s' * (seeds > 1)}, 95% intervals"
    headings = [
        "arm",
        "steps",
        metric,
        "vs plain",
        "plain steps",
        "steps saved",
        "seconds saved",
        "ICER",
        "steps spent",
    ]
    console.print()
    console.print(make_table(title, ["arm", *headings], rows, text=("arm",)))
    for run, reason in found["failed"].items():
        console.print(f"failed and excluded: {run}: {reason}")
    for name, arm in found["arms"].items():
        if arm["chosen"]:
            values = ", ".join(f"{key} {value}" for key, value in arm["chosen"].items())
            console.print(f"{name}: {values} was the best of {len(arm['variants'])} on the validation prompts")


def _mean(figure: dict[str, Any] | None, form: str) -> str:
    return "-" if figure is None else format(figure["mean"], form)


def _interval(figure: dict[str, Any] | None, form: str) -> str:
    half = "" if figure is None or figure["low"] is None else f" ±{figure['mean'] - figure['low']:.3f}"
    return _mean(figure, form) + half

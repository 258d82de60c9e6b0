"""`next-core compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from next_core.cli.console import make_console
from next_core.cli.progress import Bars
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.comparison.comparison_config import Arm, CompareConfig
    from next_core.comparison.races import RacePlan

NOTHING = "-"


def compare_command(
    path: Path,
    out: Path,
    *,
    workers: int,
    overwrite: bool,
    keep_checkpoints: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Load, race what is missing, judge, show."""
    from next_core.comparison import compare, load_comparison
    from next_core.comparison.execution import COMPARE, check_folder
    from next_core.comparison.races import make_plan
    from next_core.errors import ConfigError
    from next_core.process.quiet import quiet_libraries

    if workers < 1:
        raise ConfigError(f"--workers must be at least 1 (got {workers})")
    config, arms = load_comparison(path)
    plan = make_plan(config, arms)
    check_folder(out, plan, overwrite)
    console = make_console(as_json=as_json)
    _show_plan(plan, config, arms, out, console)
    if dry_run:
        if as_json:
            print(json_text(_plan_facts(plan, out)))
        return
    quiet_libraries()
    with Bars() as bars:
        found = compare(
            config, arms, out, overwrite=overwrite, workers=workers, keep_checkpoints=keep_checkpoints, progress=bars
        ).as_dict()
    show(found, console)
    console.print(f"Figures: {out / COMPARE}; a page of them: next-core report {out}")
    if as_json:
        print(json_text(found))


def _show_plan(plan: RacePlan, config: CompareConfig, arms: list[Arm], out: Path, console: Console) -> None:
    facts, seeds = _plan_facts(plan, out), len(config.seeds)
    console.print(
        f"{len(arms)} arms, {seeds} seed{'s' * (seeds > 1)}: {facts['races']} races, {facts['steps']} RL steps; common "
        f"prefixes save {facts['shared']} more. {facts['done']} races are done."
    )
    for arm in arms:
        values = [", ".join(f"{key} {value}" for key, value in v.values.items()) for v in arm.variants if v.values]
        chosen = f"; validation chooses among {' | '.join(values)}" if values else ""
        console.print(f"  {arm.name} ({arm.role}): {arm.variants[0].config.predictor.name}{chosen}")


def _plan_facts(plan: RacePlan, out: Path) -> dict[str, Any]:
    from next_core.comparison.execution import is_done

    return {
        "races": len(plan.races),
        "done": sum(is_done(race, out) for race in plan.races),
        "steps": plan.steps,
        "shared": plan.shared,
        "folders": {race.title: str(out / race.folder) for race in plan.races},
    }


def show(found: dict[str, Any], console: Console) -> None:
    """One table: a row for each arm."""
    metric, seeds = found["metric"], len(found["seeds"])
    console.print()
    table = Table(
        title=f"Accuracy ({metric}) on the test prompts, mean over {seeds} seed{'s' * (seeds > 1)} and 95% intervals",
        header_style="bold",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("arm", no_wrap=True)
    columns = ("steps", metric, "- plain", "= plain step", "steps saved", "seconds saved", "ICER", "steps spent")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, arm in found["arms"].items():
        beyond = "≥ " if arm["beyond"] else ""
        table.add_row(
            name,
            str(arm["steps"]),
            _interval(arm["test"][metric], ".3f"),
            _interval(arm["difference"], "+.3f"),
            beyond + _mean(arm["equals_step"], ".0f"),
            beyond + _mean(arm["steps_saved"], "+.0f"),
            beyond + _mean(arm["seconds_saved"], "+.1f"),
            _mean(arm["icer"], ".1f"),
            str(arm["spent_steps"]),
        )
    console.print(table)
    for title, reason in found["failed"].items():
        console.print(f"failed, and left out: {title}: {reason}")
    for name, arm in found["arms"].items():
        if arm["chosen"]:
            values = ", ".join(f"{key} {value}" for key, value in arm["chosen"].items())
            console.print(f"{name}: validation chose {values} of {len(arm['variants'])}")


def _mean(figure: dict[str, Any] | None, form: str) -> str:
    return NOTHING if figure is None else format(figure["mean"], form)


def _interval(figure: dict[str, Any] | None, form: str) -> str:
    if figure is None:
        return NOTHING
    mean = format(figure["mean"], form)
    return mean if figure["low"] is None else f"{mean} ±{figure['mean'] - figure['low']:.3f}"

"""`next-core plan`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from next_core.cli.options import RunOptions

if TYPE_CHECKING:
    from next_core.planning import ResourcePlan


def plan_command(
    config: Path | None,
    run: RunOptions,
    out: Path,
    *,
    horizon: int | None,
    predictor: str,
    rank: int,
    applier: str,
    fields: list[str],
    applier_fields: list[str],
    as_json: bool,
) -> None:
    """The plan of a run config, or of an extrapolation of recorded checkpoints."""
    from next_core.config import load_config, parse_assignments
    from next_core.errors import ConfigError
    from next_core.planning import plan_checkpoints, plan_run
    from next_core.plugins import make_predictor, registry

    if (config is None) == (not run.checkpoints):
        raise ConfigError("plan a run (next-core plan CONFIG) or an extrapolation (--checkpoints DIR --horizon N)")
    if config is not None:
        given = {"--horizon": horizon is not None, "--predictor": predictor != "secant", "--rank": rank != 1}
        given |= {"--set": bool(fields), "--applier": applier != "peft-adapter", "--set-applier": bool(applier_fields)}
        for option, contradicts in given.items():
            if contradicts:
                raise ConfigError(f"{option} is of an extrapolation; a run's plan takes it from its config")
        plan = plan_run(load_config(config), out)
    else:
        if horizon is None:
            raise ConfigError("--checkpoints needs --horizon, the RL steps to extrapolate")
        made = make_predictor(predictor, **parse_assignments(fields))
        target = parse_assignments(applier_fields)
        registry().make_config("applier", applier, target)
        plan = plan_checkpoints(run.source(), made, horizon, rank=rank, applier=applier, applier_fields=target, out=out)
    show_plan(plan, as_json=as_json)


def show_plan(plan: ResourcePlan, *, as_json: bool) -> None:
    """One table, a section after the other; then what the trainer tells of itself, and the notes."""
    from next_core.storage.json_lines import json_text

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column()
    for section, figures in plan.as_dict().items():
        if section == "notes":
            continue
        rows = {name: _figure(section, name, value) for name, value in figures.items() if name != "trainer"}
        for index, (name, text) in enumerate(rows.items()):
            table.add_row(section if index == 0 else "", name, escape(text))
    console.print(table)
    for fact, told in plan.compute.get("trainer", {}).items():  # a whole line each: a command is there to be copied
        text = shlex.join(map(str, told)) if isinstance(told, list | tuple) else str(told)
        console.print(f"trainer's {fact}: {text}", markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if as_json:
        print(json_text(plan.as_dict()))


def _figure(section: str, name: str, value: Any) -> str:
    from next_core.planning import gib

    if value is None:
        return "not known beforehand"
    if "bytes" in name or name == "free":
        return gib(value)
    if section == "time":
        return f"about {value:.2g} s on one core" if value >= 0.01 else "less than 0.01 s"
    if name == "flops":
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return _steps(value)
    if isinstance(value, dict):
        return f"{len(value)}" if value else "none"
    return str(value)


def _steps(values: list[int] | tuple[int, ...]) -> str:
    if len(values) <= 8:
        return ", ".join(map(str, values)) or "none"
    return f"{', '.join(map(str, values[:3]))}, ... {values[-1]} ({len(values)})"

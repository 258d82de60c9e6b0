"""``next-core plan``."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Argument, Option

from next_core.cli.console import Output
from next_core.cli.options import Checkpoints, Json, PluginOptions, SourceOptions, expand_options
from next_core.errors import contradiction


@dataclass(frozen=True, kw_only=True)
class OptionalSource(SourceOptions):
    """Recorded checkpoints, if any."""

    checkpoints: Checkpoints = field(default_factory=list)


@expand_options
def plan(
    run: OptionalSource,
    plugins: PluginOptions,
    config: Annotated[Path | None, Argument(help="YAML file of a run; or name recorded --checkpoints")] = None,
    out: Annotated[Path, Option(help="Folder that the result would go to")] = Path("runs/run"),
    horizon: Annotated[int | None, Option(min=1, help="RL steps past the newest checkpoint")] = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run or an extrapolation would read, compute and write, its memory, disk and time; do nothing."""
    from next_core.config import load_config
    from next_core.planning import plan_checkpoints, plan_run

    if config is not None and (run != OptionalSource() or plugins != PluginOptions() or horizon is not None):
        raise contradiction("CONFIG takes only --out and --json: a run's other settings are in its config")
    if config is not None:
        found = plan_run(load_config(config), out)
    elif not run.checkpoints or horizon is None:
        raise contradiction("plan a run (next-core plan CONFIG) or an extrapolation (--checkpoints DIR --horizon N)")
    else:
        predictor, rank, source = plugins.make_predictor(), plugins.rank, run.source()
        applier, fields = plugins.applier_and_fields(source)
        found = plan_checkpoints(source, predictor, horizon, rank=rank, applier=applier, applier_fields=fields, out=out)
    show_plan(found, Output(as_json))


def show_plan(plan: Mapping[str, Any], output: Output) -> None:
    """Print one table, section by section, then what the trainer adds, and the notes."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for section, figures in plan.items():
        for index, name in enumerate(figures if section != "notes" else ()):
            if name != "trainer":
                table.add_row("" if index else section, name, _figure(section, name, figures[name]))
    output.print(table)
    for fact, value in plan["compute"].get("trainer", {}).items():  # a line each, so that a command can be copied
        text = shlex.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        output.print(f"trainer's {fact}: {text}")
    for note in plan["notes"]:
        output.print(f"note: {note}")
    output.json(plan)


def _figure(section: str, name: str, value: Any) -> str:
    from next_core.planning import gib

    if value is None:
        return "unknown"
    if "bytes" in name or name == "free":
        return gib(value)
    if section == "time":
        return f"about {value:.2g} s on one core" if value >= 0.01 else "less than 0.01 s"
    if name == "flops":
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        shown = value if len(value) <= 8 else [*value[:3], f"... {value[-1]} ({len(value)})"]
        return ", ".join(map(str, shown)) or "none"
    if isinstance(value, dict):
        return f"{len(value)}" if value else "none"
    return str(value)

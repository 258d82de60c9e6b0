"""`next-core run`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from next_core.cli.progress import Bars
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.cycle.run_result import RunResult


def run_command(path: Path, out: Path, *, overwrite: bool, strict: bool, dry_run: bool, as_json: bool) -> None:
    """Load, run, show."""
    from next_core.config import load_config
    from next_core.process.quiet import quiet_libraries

    config = load_config(path)
    console = Console(stderr=as_json, markup=False, soft_wrap=True, highlight=False)
    if dry_run:
        from next_core.cli.plan_command import show_plan
        from next_core.planning import plan_run

        show_plan(plan_run(config, out), as_json=as_json)
        return
    quiet_libraries()
    from next_core.cycle.run import run
    from next_core.cycle.run_result import RESULT
    from next_core.cycle.signals import Signals
    from next_core.diagnostics.learning_rate import run_advice
    from next_core.errors import Interrupted

    done = not overwrite and (out / RESULT).exists()
    with Signals() as signals:
        try:
            with Bars() as bars:
                result = run(
                    config, out, overwrite=overwrite, strict=strict, progress=bars, signals=signals, advise=run_advice
                )
        except KeyboardInterrupt:
            raise Interrupted(
                f"{signals.name} ended the run at once; the same command goes on from the last checkpoint in {out}",
                signals.received or signal.SIGINT,
            ) from None
    if done:
        console.print(f"{out} holds this run, and it is finished; --overwrite runs it again.")
    show(result, console)
    if as_json:
        print(json_text(result.as_dict()))


def show(result: RunResult, console: Console) -> None:
    """The table of a run: accuracies beside the plain run's, every jump, and where the time went."""
    console.print()
    table = Table(title="Accuracy on the test prompts", header_style="bold", title_justify="left")
    for column in ("run", "steps", "start", "before first jump", "right after", "end"):
        table.add_column(column, justify="left" if column == "run" else "right")
    keys = ("start", "before_jump", "after_jump", "final")
    table.add_row("with jumps", str(result.steps), *(_figure(result.accuracy[key]) for key in keys))
    if result.control is not None:
        control = result.control["accuracy"]
        row = (_figure(result.accuracy["start"]), "", "", _figure(control["final"]))
        table.add_row("plain, same seed", str(result.control["steps"]), *row)
    console.print(table)
    if result.jumps:
        title = "Jumps (norm: over that of the motion just before)"
        jumps = Table(title=title, header_style="bold", title_justify="left")
        for column in ("step", "predictor", "alpha", "norm", "accuracy", "decision"):
            jumps.add_column(column, justify="left" if column in ("predictor", "decision") else "right")
        for jump in result.jumps:
            before, after = (_figure(jump.get(f"accuracy_{when}")) for when in ("before", "after"))
            verdict = "made" if jump["accepted"] else "refused"
            jumps.add_row(
                str(jump["step"]),
                jump["predictor"],
                f"{jump['alpha']:g}",
                _figure(jump["norm_ratio"], 2),
                f"{before} → {after}",
                f"{verdict}: {jump['reason']}",
            )
        console.print(jumps)
    if result.average is not None:
        made = f"taken: {result.average['reason']}" if result.average["accepted"] else result.average["reason"]
        was = _figure(result.accuracy.get("before_average"))
        console.print(f"Mean at the end: {made} (before it {was} on the test prompts).")
    seconds = result.seconds
    parts = [
        f"RL {seconds['rl']:.1f}",
        f"next-core {seconds['ours'] - seconds['ours_probe']:.2f}",
        f"its probes {seconds['ours_probe']:.1f}",
    ]
    if result.control is not None:
        parts.append(f"the plain run {result.control['seconds']:.1f}")
    console.print(f"Seconds: {', '.join(parts)}, in all {seconds['total']:.1f}.")
    if result.advice is not None:
        console.print(f"Advice: {result.advice}")
    for note in result.notes:
        console.print(f"Note: {note}.")
    console.print(f"Folder: {result.folder}")


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

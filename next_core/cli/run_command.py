"""``next-core run``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Argument, Option

from next_core.cli.console import make_console, make_table, progress_bars
from next_core.cli.options import Json
from next_core.errors import Interrupted
from next_core.process.quiet import quiet_libraries
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.cycle.run_result import RunResult


def run(
    config: Annotated[Path, Argument(help="YAML file of the run; see `next-core schema`")],
    out: Annotated[Path, Option(help="Folder for checkpoints, jumps, journal and result")] = Path("runs/run"),
    overwrite: Annotated[bool, Option("--overwrite", help="Delete an earlier run in --out")] = False,
    strict: Annotated[bool, Option("--strict", help="Stop with exit code 4 when a jump is refused")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the config and print the plan; train nothing")] = False,
    as_json: Json = False,
) -> None:
    """Train with jumps on a real trainer and, if the config asks for it, once more without them.

    Run the same command again to resume an interrupted run from its last checkpoint.
    """
    from next_core.config import load_config

    loaded = load_config(config)
    if dry_run:
        from next_core.cli.plan_command import show_plan
        from next_core.planning import plan_run

        show_plan(plan_run(loaded, out), as_json=as_json)
        return
    from next_core.cycle.run import run
    from next_core.cycle.run_result import RESULT
    from next_core.cycle.signals import Signals
    from next_core.diagnostics.learning_rate import run_advice

    quiet_libraries()
    console = make_console(as_json=as_json)
    finished = not overwrite and (out / RESULT).exists()
    with Signals() as signals:
        try:
            with progress_bars() as progress:
                result = run(
                    loaded,
                    out,
                    overwrite=overwrite,
                    strict=strict,
                    progress=progress,
                    signals=signals,
                    advise=run_advice,
                )
        except KeyboardInterrupt:
            raise Interrupted(
                f"{signals.name} stopped the run at once; run the same command again to resume from the last "
                f"checkpoint in {out}",
                signals.received or signal.SIGINT,
            ) from None
    if finished:
        console.print(f"{out} already holds this finished run; --overwrite runs it again.")
    show_result(result, console)
    if as_json:
        print(json_text(result.as_dict()))


def show_result(result: RunResult, console: Console) -> None:
    """Print accuracies, jumps, the time spent and hints."""
    accuracy, control = result.accuracy, result.control
    keys = ("start", "before_jump", "after_jump", "final")
    rows = [["with jumps", str(result.steps), *(_figure(accuracy[key]) for key in keys)]]
    if control is not None:
        end = _figure(control["accuracy"]["final"])
        rows.append(["plain, same seed", str(control["steps"]), _figure(accuracy["start"]), "", "", end])
    headings = ["run", "steps", "start", "before first jump", "after it", "end"]
    console.print()
    console.print(make_table("Accuracy on the test prompts", headings, rows, text=("run",)))
    if result.jumps:
        title = "Jumps (norm: relative to the update just before; accuracy: on the validation prompts)"
        headings = ["step", "predictor", "alpha", "norm", "accuracy", "outcome"]
        console.print(make_table(title, headings, map(_jump, result.jumps), text=("predictor", "outcome")))
    if result.average is not None:
        outcome = "used" if result.average["accepted"] else "not used"
        before = _figure(accuracy.get("before_average"))
        console.print(f"Average of the last checkpoints {outcome}: {result.average['reason']}")
        console.print(f"Test accuracy without the average: {before}")
    seconds = result.seconds
    parts = [
        f"RL {seconds['rl']:.1f}",
        f"next-core {seconds['ours'] - seconds['ours_probe']:.2f}",
        f"evaluating jumps {seconds['ours_probe']:.1f}",
        *([] if control is None else [f"plain run {control['seconds']:.1f}"]),
        f"total {seconds['total']:.1f}",
    ]
    console.print(f"Seconds: {', '.join(parts)}.")
    if result.advice is not None:
        console.print(f"Hint: {result.advice}")
    for note in result.notes:
        console.print(f"Note: {note}.")
    console.print(f"Folder: {result.folder}")


def _jump(jump: dict[str, Any]) -> list[str]:
    return [
        str(jump["step"]),
        jump["predictor"],
        f"{jump['alpha']:g}",
        _figure(jump["norm_ratio"], 2),
        f"{_figure(jump.get('accuracy_before'))} → {_figure(jump.get('accuracy_after'))}",
        f"{'made' if jump['accepted'] else 'refused'}: {jump['reason']}",
    ]


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

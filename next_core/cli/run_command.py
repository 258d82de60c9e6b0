"""``next-core run``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from next_core.cli.console import Output, progress_bars
from next_core.cli.options import Json
from next_core.errors import Interrupted
from next_core.process.quiet import quiet_libraries

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
    """Train on a real trainer with jumps or step scaling and, if the config asks for it, once more without.

    Run the same command again to resume an interrupted run from its last checkpoint.
    """
    from next_core.config import load_config

    loaded, output = load_config(config), Output(as_json)
    if dry_run:
        from next_core.cli.plan_command import show_plan
        from next_core.planning import plan_run

        show_plan(plan_run(loaded, out), output)
        return
    from next_core.cycle.run import run
    from next_core.cycle.run_result import RESULT
    from next_core.cycle.signals import Signals
    from next_core.diagnostics.learning_rate import run_advice

    quiet_libraries()
    finished = not overwrite and (out / RESULT).exists()
    with Signals() as signals:
        try:
            with progress_bars() as progress:
                options: dict[str, Any] = {"progress": progress, "signals": signals, "advise": run_advice}
                result = run(loaded, out, overwrite=overwrite, strict=strict, **options)
        except KeyboardInterrupt:
            raise Interrupted(
                f"{signals.name} stopped the run at once; run the same command again to resume from the last "
                f"checkpoint in {out}",
                signals.received or signal.SIGINT,
            ) from None
    if finished:
        output.print(f"{out} already holds this finished run; --overwrite runs it again.")
    show_result(result, output)
    output.json(result.as_dict())


def show_result(result: RunResult, output: Output) -> None:
    """Print accuracies, jumps, the time spent and hints."""
    from next_core.cycle.summary import average_text, scaling_text

    accuracy, control = result.accuracy, result.control
    headings = {"start": "start", "before_jump": "before first jump", "after_jump": "after it", "final": "end"}
    ends = {heading: _figure(accuracy[key]) for key, heading in headings.items()}
    rows = [{"run": "step scaling" if result.scaling else "with jumps", "steps": str(result.steps), **ends}]
    if control is not None:
        gaps = {"before first jump": "", "after it": "", "end": _figure(control["accuracy"]["final"])}
        rows.append({"run": "plain, same seed", "steps": str(control["steps"]), **ends, **gaps})
    output.print()
    output.table("Accuracy on the test prompts", rows)
    if result.jumps:
        title = "Jumps (norm: relative to the update just before; accuracy: on the validation prompts)"
        output.table(title, map(_jump, result.jumps), words=("predictor", "outcome"))
    if result.scaling:
        output.print(scaling_text(result.scaling))
    if result.average is not None:
        output.print(average_text(result.average))
        output.print(f"Test accuracy without the average: {_figure(accuracy.get('before_average'))}")
    seconds = result.seconds
    ours = f"next-core {seconds['ours'] - seconds['ours_probe']:.2f}, evaluating {seconds['ours_probe']:.1f}"
    plain = "" if control is None else f", plain run {control['seconds']:.1f}"
    output.print(f"Seconds: RL {seconds['rl']:.1f}, {ours}{plain}, total {seconds['total']:.1f}.")
    if result.advice is not None:
        output.print(f"Hint: {result.advice}")
    for note in result.notes:
        output.print(f"Note: {note}.")
    output.print(f"Folder: {result.folder}")


def _jump(jump: dict[str, Any]) -> dict[str, str]:
    return {
        "step": str(jump["step"]),
        "predictor": jump["predictor"],
        "alpha": f"{jump['alpha']:g}",
        "norm": _figure(jump["norm_ratio"], 2),
        "accuracy": f"{_figure(jump.get('accuracy_before'))} → {_figure(jump.get('accuracy_after'))}",
        "outcome": f"{'made' if jump['accepted'] else 'refused'}: {jump['reason']}",
    }


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

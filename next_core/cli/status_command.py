"""``next-core status``."""

import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from next_core.cli.console import Output
from next_core.cli.options import Json
from next_core.errors import ConfigError

INTERVAL = 2.0  # Seconds between two looks at a running folder


def status(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run or of the TRL callback")],
    follow: Annotated[bool, Option("--follow", help="Print what changes until the run ends")] = False,
    as_json: Json = False,
) -> None:
    """Show whether a run is still going, how far it is, and what it did and gained so far."""
    output, before = Output(as_json), list[str]()
    while True:
        facts = read_status(folder)
        process, steps = facts["process"], facts["steps"]
        going = facts["state"] + ("" if process is None else f" (process {process})")
        lines = [f"{going}: step {facts['step']} of {steps or '?'}, predictor {facts['predictor']}", *facts["summary"]]
        if lines != before:
            for line in lines:
                if line not in before:
                    output.print(line)
            output.json(facts)
        if process is None or not follow:
            return
        before = lines
        time.sleep(INTERVAL)


def read_status(folder: Path) -> dict[str, Any]:
    """Return the facts about a run. Raises ``ConfigError`` for a folder without one, ``CheckpointError`` for damage."""
    from next_core.cycle.summary import summary
    from next_core.report.inputs import Recorded, open_folder
    from next_core.storage.locking import holder

    process = holder(folder)  # before the journal, so that the end of a run is not missed
    run = open_folder(folder)
    if not isinstance(run, Recorded):
        message = f"{folder} holds a comparison; name the folder of one of its runs"
        raise ConfigError(message, kind="report-unknown-folder")
    ended = any(record["event"] == "end" for record in run.events)
    return {
        "folder": str(folder),
        "state": "running" if process is not None else "finished" if ended else "stopped early",
        "process": process,
        "step": run.last_step,
        "steps": run.started.get("steps"),
        "predictor": run.predictor,
        "summary": summary(run.events, run.metrics),
    }


def show_end(folder: Path) -> None:
    """Print what the run in a folder did, when a training has ended, and how to read more."""
    facts, output = read_status(folder), Output(as_json=False)
    output.console.rule(f"next-core after {facts['step']} steps")
    for line in [*facts["summary"], f"Folder: {folder}", f"Report: next-core report {folder}"]:
        output.print(line)

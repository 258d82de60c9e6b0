"""The command line: one module for each command, composed here."""

from typing import Annotated

import typer

from next_core.cli.analyze_command import analyze
from next_core.cli.backtest_command import backtest
from next_core.cli.compare_command import compare
from next_core.cli.extrapolate_command import extrapolate
from next_core.cli.plan_command import plan
from next_core.cli.plugins_command import plugins, schema
from next_core.cli.report_command import report
from next_core.cli.run_command import run
from next_core.cli.status_command import status

EXIT_CODES = (
    "Exit codes: 0 success, 1 other error, 2 config, 3 checkpoint, 4 guard (with --strict), 5 plug-in, 6 backend, "
    "7 disk full or not writable, 130 Ctrl-C, 143 SIGTERM."
)

app = typer.Typer(
    name="next-core",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Accelerate an RLVR run: watch its checkpoints, predict where the weights are going, jump there, check the "
    "jump, and continue training.",
    epilog=EXIT_CODES,
)
for command in (run, status, extrapolate, analyze, backtest, compare, plan, report, plugins, schema):
    app.command(epilog=EXIT_CODES)(command)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"next-core {installed('next-core')}")
        raise typer.Exit

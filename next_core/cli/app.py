"""The commands and their options; each command's work is in the module of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = "Exit codes: 0 done, 2 config, 3 checkpoint, 4 guard (with --strict), 5 plug-in, 6 backend."

app = typer.Typer(
    name="next-core",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Watch an RLVR run through its checkpoints, predict where the weights are going, jump there, check the "
    "jump, and let the trainer go on.",
    epilog=EXIT_CODES,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the plug-in, e.g. gate.window=25")
]


@app.command(epilog=EXIT_CODES)
def run(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; see `next-core schema`")],
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, jumps, journal, result")] = Path("runs/run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A refused jump ends the run with exit code 4")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config and print the plan; train nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Train from a config: a real trainer, with jumps, and a plain run beside it if the config asks for one."""
    from next_core.cli.run import run_command

    run_command(config, out, resume=resume, overwrite=overwrite, strict=strict, dry_run=dry_run, as_json=json)


@app.command(epilog=EXIT_CODES)
def extrapolate(
    checkpoints: Annotated[Path, typer.Option(help="Folder that holds checkpoint-N or step-N folders")],
    out: Annotated[Path, typer.Option(help="Where the extrapolated weights go; must not exist")],
    horizon: Annotated[int, typer.Option(help="RL steps past the newest checkpoint")],
    predictor: Annotated[str, typer.Option(help="A predictor's name; see `next-core plugins`")] = "secant",
    backbone: Annotated[Path | None, typer.Option(help="The base model's folder")] = None,
    alpha: Annotated[float, typer.Option(help="Scale of the jump")] = 1.0,
    rank: Annotated[int, typer.Option(help="Rank k of the factors the predictor reads")] = 1,
    applier: Annotated[str, typer.Option(help="peft-adapter or merged-model")] = "peft-adapter",
    set_: Set = None,
    set_applier: Annotated[
        list[str] | None,
        typer.Option("--set-applier", metavar="KEY=VALUE", help="A field of the applier, e.g. rank=16"),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Force a checkpoint layout by its source's name")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict and report; write nothing")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 when a matrix abstains")] = False,
    json: Json = False,
) -> None:
    """Extrapolate checkpoints you already have, and write the predicted weights."""
    from next_core.cli.extrapolate import extrapolate_command

    extrapolate_command(
        checkpoints,
        out,
        horizon=horizon,
        predictor=predictor,
        backbone=backbone,
        alpha=alpha,
        rank=rank,
        applier=applier,
        fields=set_ or [],
        applier_fields=set_applier or [],
        layout=layout,
        dry_run=dry_run,
        strict=strict,
        as_json=json,
    )


@app.command()
def plugins(json: Json = False) -> None:
    """List every plug-in: kind, name, distribution, version, status."""
    from next_core.cli.plugins import plugins_command

    plugins_command(as_json=json)


@app.command()
def schema() -> None:
    """Print the JSON schema of the run config, with the fields of every installed plug-in."""
    from next_core.cli.plugins import schema_command

    schema_command()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"next-core {installed('next-core')}")
        raise typer.Exit

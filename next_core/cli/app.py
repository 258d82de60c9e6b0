"""The commands and their options; each command's work is in the module of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from next_core.cli.options import (
    Address,
    AllowPickle,
    Applier,
    Backbone,
    CacheFolder,
    Checkpoints,
    Compression,
    ExecutorName,
    Json,
    Layout,
    Masters,
    NoCache,
    Predictor,
    Rank,
    RunOptions,
    Set,
    SetApplier,
    SkipDamaged,
    Workers,
)

EXIT_CODES = (
    "Exit codes: 0 done, 1 other, 2 config, 3 checkpoint, 4 guard (with --strict), 5 plug-in, 6 backend, 7 disk (full, "
    "or not writable), 130 Ctrl-C, 143 SIGTERM."
)

app = typer.Typer(
    name="next-core",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Watch an RLVR run through its checkpoints, predict where the weights are going, jump there, check the "
    "jump, and let the trainer go on.",
    epilog=EXIT_CODES,
)


@app.command(epilog=EXIT_CODES)
def run(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; see `next-core schema`")],
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, jumps, journal, result")] = Path("runs/run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A refused jump ends the run with exit code 4")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config and print the plan; train nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Train from a config: a real trainer, with jumps, and a plain run beside it if the config asks for one.

    A run that was ended early goes on from its last checkpoint by the same command.
    """
    from next_core.cli.run_command import run_command

    run_command(config, out, overwrite=overwrite, strict=strict, dry_run=dry_run, as_json=json)


@app.command(epilog=EXIT_CODES)
def extrapolate(
    checkpoints: Checkpoints,
    out: Annotated[Path, typer.Option(help="Where the extrapolated weights go; must not exist")],
    horizon: Annotated[int, typer.Option(help="RL steps past the newest checkpoint")],
    predictor: Predictor = "secant",
    backbone: Backbone = None,
    alpha: Annotated[float, typer.Option(help="Scale of the jump")] = 1.0,
    alphas: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Write one folder for each of these scales into --out")
    ] = None,
    rank: Rank = 1,
    applier: Applier = "peft-adapter",
    set_: Set = None,
    set_applier: SetApplier = None,
    layout: Layout = None,
    skip_damaged: SkipDamaged = False,
    allow_pickle: AllowPickle = False,
    masters: Masters = False,
    compressor: Compression = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    executor: ExecutorName = "local",
    workers: Workers = 1,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict and report; write nothing")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 when a matrix abstains")] = False,
    json: Json = False,
) -> None:
    """Extrapolate checkpoints you already have, and write the predicted weights."""
    from next_core.cli.extrapolate_command import extrapolate_command

    extrapolate_command(
        RunOptions(
            checkpoints,
            backbone,
            layout,
            skip_damaged=skip_damaged,
            allow_pickle=allow_pickle,
            masters=masters,
            compressor=compressor,
            cache=cache,
            no_cache=no_cache,
            executor=executor,
            workers=workers,
            address=address,
        ),
        out,
        horizon=horizon,
        predictor=predictor,
        alpha=alpha,
        alphas=alphas,
        rank=rank,
        applier=applier,
        fields=set_ or [],
        applier_fields=set_applier or [],
        dry_run=dry_run,
        strict=strict,
        as_json=json,
    )


@app.command(epilog=EXIT_CODES)
def analyze(
    checkpoints: Checkpoints,
    backbone: Backbone = None,
    horizon: Annotated[
        int | None,
        typer.Option(
            help="RL steps ahead of the out-of-sample figures; default: the longest that is at most a third of the run"
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="What the table's rows are: layer, kind or matrix")] = "kind",
    spectrum: Annotated[
        bool | None, typer.Option("--spectrum/--no-spectrum", help="Take all singular values; default: for LoRA only")
    ] = None,
    draws: Annotated[int, typer.Option(min=20, help="Random walks drawn for each null")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random walks")] = 0,
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder (extra `report`)")] = None,
    layout: Layout = None,
    skip_damaged: SkipDamaged = False,
    allow_pickle: AllowPickle = False,
    masters: Masters = False,
    compressor: Compression = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    executor: ExecutorName = "local",
    workers: Workers = 1,
    address: Address = None,
    json: Json = False,
) -> None:
    """Measure how a run's weights move, each figure beside that of a random walk."""
    from next_core.cli.analyze_command import analyze_command

    analyze_command(
        RunOptions(
            checkpoints,
            backbone,
            layout,
            skip_damaged=skip_damaged,
            allow_pickle=allow_pickle,
            masters=masters,
            compressor=compressor,
            cache=cache,
            no_cache=no_cache,
            executor=executor,
            workers=workers,
            address=address,
        ),
        horizon=horizon,
        by=by,
        spectrum=spectrum,
        draws=draws,
        seed=seed,
        plots=plots,
        as_json=json,
    )


@app.command(epilog=EXIT_CODES)
def backtest(
    checkpoints: Checkpoints,
    backbone: Backbone = None,
    predictors: Annotated[
        str | None,
        typer.Option(metavar="all|A,B,...", help="Which to judge; default: all but those that train networks"),
    ] = None,
    horizon: Annotated[
        int | None,
        typer.Option(help="RL steps ahead; default: at least two checkpoints, whichever gives the most cuts"),
    ] = None,
    cuts: Annotated[
        int | None, typer.Option(help="Predict from so many steps only, evenly spaced back from the last")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random walks on which everything is repeated; 0: no null")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random walks and of the intervals")] = 0,
    rank: Rank = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME.KEY=VALUE", help="A field of one predictor, e.g. secant.window=25"),
    ] = None,
    layout: Layout = None,
    skip_damaged: SkipDamaged = False,
    allow_pickle: AllowPickle = False,
    masters: Masters = False,
    compressor: Compression = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    executor: ExecutorName = "local",
    workers: Workers = 1,
    address: Address = None,
    json: Json = False,
) -> None:
    """Judge predictors on a recorded run, walking forward, each beside random walks; train nothing."""
    from next_core.cli.backtest_command import backtest_command

    backtest_command(
        RunOptions(
            checkpoints,
            backbone,
            layout,
            skip_damaged=skip_damaged,
            allow_pickle=allow_pickle,
            masters=masters,
            compressor=compressor,
            cache=cache,
            no_cache=no_cache,
            executor=executor,
            workers=workers,
            address=address,
        ),
        predictors=predictors,
        horizon=horizon,
        cuts=cuts,
        draws=draws,
        seed=seed,
        rank=rank,
        fields=set_ or [],
        as_json=json,
    )


@app.command(epilog=EXIT_CODES)
def compare(
    config: Annotated[Path, typer.Argument(help="The comparison's YAML file; see docs/compare.md")],
    out: Annotated[Path, typer.Option(help="The comparison's folder; the same command goes on in it")] = Path(
        "runs/compare"
    ),
    workers: Annotated[int, typer.Option(help="Races at a time, each in a process of its own")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Lose the races in --out, and begin anew")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep every race's checkpoints, not its figures alone")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config and list the races; train nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Race predictors against plain RL and its controls at equal budget, on a real trainer, the seeds paired."""
    from next_core.cli.compare_command import compare_command

    compare_command(
        config,
        out,
        workers=workers,
        overwrite=overwrite,
        keep_checkpoints=keep_checkpoints,
        dry_run=dry_run,
        as_json=json,
    )


@app.command(epilog=EXIT_CODES)
def plan(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file; or name recorded --checkpoints")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run's checkpoints, or several folders of checkpoints")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the result would go")] = Path("runs/run"),
    horizon: Annotated[int | None, typer.Option(help="RL steps past the newest checkpoint")] = None,
    predictor: Predictor = "secant",
    backbone: Backbone = None,
    rank: Rank = 1,
    applier: Applier = "peft-adapter",
    set_: Set = None,
    set_applier: SetApplier = None,
    layout: Layout = None,
    skip_damaged: SkipDamaged = False,
    allow_pickle: AllowPickle = False,
    masters: Masters = False,
    json: Json = False,
) -> None:
    """Say what a run or an extrapolation would read, compute and write, with memory, disk and time; do nothing."""
    from next_core.cli.plan_command import plan_command

    plan_command(
        config,
        RunOptions(
            checkpoints or [],
            backbone,
            layout,
            skip_damaged=skip_damaged,
            allow_pickle=allow_pickle,
            masters=masters,
        ),
        out,
        horizon=horizon,
        predictor=predictor,
        rank=rank,
        applier=applier,
        fields=set_ or [],
        applier_fields=set_applier or [],
        as_json=json,
    )


@app.command(epilog=EXIT_CODES)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, of a comparison, or of the TRL callback")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report/index.html in the folder")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write every picture into this folder, PNG and SVG")] = None,
    geometry: Annotated[
        bool, typer.Option("--geometry/--no-geometry", help="Measure the checkpoints of a run, or leave it out")
    ] = True,
    predictor: Annotated[str, typer.Option(help="Whose skill is shown by layer")] = "secant",
    backbone: Backbone = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Write one HTML page about a run or a comparison (extra `report`)."""
    from next_core.cli.report_command import report_command

    report_command(
        folder,
        out=out,
        figures=figures,
        geometry=geometry,
        predictor=predictor,
        backbone=backbone,
        cache=cache,
        no_cache=no_cache,
        as_json=json,
    )


@app.command()
def plugins(json: Json = False) -> None:
    """List every plug-in: kind, name, distribution, version, status."""
    from next_core.cli.plugins_command import plugins_command

    plugins_command(as_json=json)


@app.command()
def schema() -> None:
    """Print the JSON schema of the run config, with the fields of every installed plug-in."""
    from next_core.cli.plugins_command import schema_command

    schema_command()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"next-core {installed('next-core')}")
        raise typer.Exit

"""``next-core extrapolate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from next_core.cli.console import make_console, progress_bars, shorten
from next_core.cli.options import (
    Applier,
    Json,
    Predictor,
    Rank,
    RunOptions,
    Set,
    SetApplier,
    expand_options,
    show_source,
)
from next_core.errors import CheckpointError, ConfigError, GuardError
from next_core.storage.json_lines import json_text

if TYPE_CHECKING:
    from next_core.interfaces import Applied

MOST_UNCHANGED = 8


@expand_options
def extrapolate(
    run: RunOptions,
    out: Annotated[Path, Option(help="Folder for the extrapolated weights; must not exist")],
    horizon: Annotated[int, Option(help="RL steps past the newest checkpoint")],
    predictor: Predictor = "secant",
    alpha: Annotated[float, Option(help="Factor on the length of the jump")] = 1.0,
    alphas: Annotated[
        str | None, Option(metavar="A,B,...", help="Write one folder into --out for each of these factors")
    ] = None,
    rank: Rank = 1,
    applier: Applier = "peft-adapter",
    settings: Set = None,
    applier_settings: SetApplier = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Predict and print the result; write nothing")] = False,
    strict: Annotated[bool, Option("--strict", help="Exit with 4 when the predictor abstains for a matrix")] = False,
    as_json: Json = False,
) -> None:
    """Extrapolate recorded checkpoints and write the predicted weights."""
    from next_core.appliers.alpha_sweep import apply_sweep, makes_folders
    from next_core.appliers.folder_applier import FolderApplier
    from next_core.config import parse_assignments
    from next_core.cycle.jump_norm import jump_norm
    from next_core.plugins import make_applier, make_predictor
    from next_core.sources.precision import rounding_warnings

    scales = _scales(alpha, alphas)
    if horizon < 1:
        raise ConfigError(f"--horizon must be at least 1 (got {horizon})", kind="config-invalid-value")
    made = make_predictor(predictor, **parse_assignments(settings or []))
    target = make_applier(applier, **parse_assignments(applier_settings or []))
    if not target.writes_folders:
        raise ConfigError(
            f"the applier '{applier}' changes a model in memory; use peft-adapter or merged-model",
            kind="config-invalid-value",
        )
    if alphas is not None and not makes_folders(target):
        raise ConfigError(
            f"--alphas needs an applier that writes new folders; '{applier}' with these settings does not",
            kind="config-contradiction",
        )
    console = make_console(as_json=as_json)
    source = run.source()
    if isinstance(target, FolderApplier):
        target.check_source(source, out, dry_run)  # before the work
    facts = show_source(run, source, console)
    warnings = rounding_warnings(source)
    for warning in warnings:
        console.print(f"  warning: {warning}")
    with progress_bars() as progress:
        made.progress = progress
        history = run.history(source, rank, progress)
        prediction = made.fit(history).predict(horizon)
    if prediction.abstention is not None:
        where = ", ".join(map(str, run.checkpoints))
        raise CheckpointError(
            f"{predictor} predicts nothing from {where}: {prediction.abstention}", kind="predictor-abstained"
        )
    if strict and prediction.abstained:
        name, reason = next(iter(prediction.abstained.items()))
        raise GuardError(
            f"{predictor} abstains for {len(prediction.abstained)} matrices, among them '{name}': {reason}",
            kind="predictor-abstained",
        )
    norm = jump_norm(prediction, alpha, history)
    written: dict[float, Applied] = {}
    if not dry_run:
        with progress_bars() as progress:
            target.progress = progress
            if alphas is None:
                written = {alpha: target.apply(prediction, alpha, out=out)}
            else:
                written = dict(apply_sweep(target, prediction, scales, out))
    remaining = {f"{scale:g}": getattr(applied, "share", None) for scale, applied in written.items()}
    console.print(
        f"{predictor} extrapolated {len(prediction.updates)} matrices by {horizon} steps; the norm of the jump is "
        f"{norm.ratio:.2f} times that of the update over the last {horizon} steps"
    )
    unchanged = [f"  unchanged: {name}: {reason}" for name, reason in prediction.abstained.items()]
    for line in shorten(unchanged, MOST_UNCHANGED, "  unchanged"):
        console.print(line)
    if history.cache_trouble is not None:
        console.print(f"  note: {history.cache_trouble}")
    console.print("nothing written (--dry-run)" if dry_run else f"written: {out} ({applier})")
    for scale, share in remaining.items():
        if share is not None:
            console.print(f"  alpha {scale}: {share:.1%} of the jump remains after rounding to the stored precision")
    if as_json:
        facts |= {
            "warnings": warnings,
            "predictor": predictor,
            "horizon": horizon,
            "alpha": alpha if alphas is None else scales,
            "rank": rank,
            "moved": len(prediction.updates),
            "abstained": dict(prediction.abstained),
            "norm": norm.jump,
            "norm_ratio": norm.ratio,
            "diagnostics": dict(prediction.diagnostics),
            "applier": applier,
            "out": None if dry_run else str(out),
            "share_landed": remaining,
        }
        print(json_text(facts))


def _scales(alpha: float, alphas: str | None) -> list[float]:
    """Return the factors that ``--alpha`` or ``--alphas`` asks for. Raises ``ConfigError``."""
    from next_core.appliers.alpha_sweep import folder_names

    if alphas is None:
        if not 0 < alpha < math.inf:
            raise ConfigError(f"--alpha must be a number above 0 (got {alpha:g})", kind="config-invalid-value")
        return [alpha]
    if alpha != 1.0:
        raise ConfigError("--alpha and --alphas contradict; omit one of them", kind="config-contradiction")
    try:
        scales = [float(part) for part in alphas.split(",")]
    except ValueError:
        raise ConfigError(
            f"--alphas takes numbers separated by commas, such as 0.5,1,2 (got {alphas})", kind="config-invalid-value"
        ) from None
    folder_names(scales)
    return scales

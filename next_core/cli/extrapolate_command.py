"""`next-core extrapolate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from next_core.cli.options import RunOptions, report
from next_core.cli.progress import Bars

if TYPE_CHECKING:
    from next_core.interfaces import Applied


MOST_NAMED = 8
"""Matrices that stay where they are, which people are told by name."""


def extrapolate_command(
    run: RunOptions,
    out: Path,
    *,
    horizon: int,
    predictor: str,
    alpha: float,
    alphas: str | None,
    rank: int,
    applier: str,
    fields: list[str],
    applier_fields: list[str],
    dry_run: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Open, fit, predict, apply; say what moved and what did not."""
    from next_core.appliers.alpha_sweep import apply_sweep, folder_names, makes_folders
    from next_core.appliers.folder_applier import FolderApplier
    from next_core.config import parse_assignments
    from next_core.cycle.jump_norm import jump_norm
    from next_core.errors import CheckpointError, ConfigError, GuardError
    from next_core.plugins import make_applier, make_predictor
    from next_core.sources.precision import rounding_warnings
    from next_core.storage.json_lines import json_text

    if alphas is not None and alpha != 1.0:
        raise ConfigError("--alpha and --alphas contradict; leave one out")
    if not 0 < alpha < math.inf:
        raise ConfigError(f"--alpha must be a number above 0 (got {alpha:g})")
    if horizon < 1:
        raise ConfigError(f"--horizon must be at least 1 (got {horizon})")
    made = make_predictor(predictor, **parse_assignments(fields))
    target = make_applier(applier, **parse_assignments(applier_fields))
    if not target.writes_folders:
        raise ConfigError(
            f"the applier '{applier}' changes a model in memory; use peft-adapter or merged-model",
            kind="config-invalid-value",
        )
    in_place = getattr(target.config, "in_place", False)
    if out.exists() and not (dry_run or in_place):
        raise ConfigError(f"{out} exists already; choose another folder or remove it")
    scales = None if alphas is None else parse_alphas(alphas)
    if scales is not None:  # before the work, not after it
        folder_names(scales)
        if not makes_folders(target):
            raise ConfigError(f"--alphas needs an applier that writes new folders; '{applier}' does not, as it is set")
    console = Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True)
    source = run.source()
    if isinstance(target, FolderApplier):  # what cannot be written is said before the work
        target.check_source(source, out, dry_run)
    found = report(run, source, console)
    warnings = rounding_warnings(source)
    for warning in warnings:
        console.print(f"  warning: {warning}")
    with Bars() as bars:
        made.progress = bars
        history = run.history(source, rank, bars)
        prediction = made.fit(history).predict(horizon)
    if prediction.abstention is not None:
        raise CheckpointError(f"{predictor} predicts nothing from {run}: {prediction.abstention}")
    if strict and prediction.abstained:
        name, reason = next(iter(prediction.abstained.items()))
        raise GuardError(f"{len(prediction.abstained)} matrices abstain, among them '{name}': {reason}")
    norm = jump_norm(prediction, alpha, history)
    written: dict[float, Applied] = {}
    if not dry_run:
        with Bars() as bars:
            target.progress = bars
            if scales is not None:
                written = dict(apply_sweep(target, prediction, scales, out))
            else:
                written = {alpha: target.apply(prediction, alpha, out=out)}
    landed = {f"{a:g}": getattr(applied, "share", None) for a, applied in written.items()}
    facts: dict[str, Any] = {
        **found,
        "warnings": warnings,
        "predictor": predictor,
        "horizon": horizon,
        "alpha": alpha if scales is None else scales,
        "rank": rank,
        "moved": len(prediction.updates),
        "abstained": dict(prediction.abstained),
        "norm": norm.jump,
        "norm_ratio": norm.ratio,
        "diagnostics": dict(prediction.diagnostics),
        "applier": applier,
        "out": None if dry_run else str(out),
        "share_landed": landed,
    }
    console.print(
        f"{predictor} moved {len(prediction.updates)} matrices by {horizon} steps, "
        f"{norm.ratio:.2f} times the recent motion"
    )
    for name, reason in list(prediction.abstained.items())[:MOST_NAMED]:
        console.print(f"  stays: {name}: {reason}")
    if len(prediction.abstained) > MOST_NAMED:
        console.print(f"  and {len(prediction.abstained) - MOST_NAMED} more stay; --json names them all")
    if history.cache_trouble is not None:
        console.print(f"  note: {history.cache_trouble}")
    console.print("nothing written (--dry-run)" if dry_run else f"written: {out} ({applier})")
    for scale, share in landed.items():
        if share is not None:
            console.print(f"  alpha {scale}: {share:.1%} of the jump is left after rounding to what is stored")
    if as_json:
        print(json_text(facts))


def parse_alphas(text: str) -> list[float]:
    """``0.5,1,2`` as numbers. Raises ``ConfigError`` for anything else."""
    from next_core.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--alphas takes numbers with commas between them, as 0.5,1,2 (got {text})") from None

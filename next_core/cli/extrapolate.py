"""`next-core extrapolate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from next_core.cli.progress import Bars


def extrapolate_command(
    checkpoints: Path,
    out: Path,
    *,
    horizon: int,
    predictor: str,
    backbone: Path | None,
    alpha: float,
    rank: int,
    applier: str,
    fields: list[str],
    applier_fields: list[str],
    layout: str | None,
    dry_run: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Open, fit, predict, apply; say what moved and what did not."""
    from next_core.config import parse_assignments
    from next_core.cycle.guards import jump_norm
    from next_core.errors import CheckpointError, ConfigError, GuardError
    from next_core.history import History
    from next_core.plugins import make_applier, make_predictor
    from next_core.sources.opening import open_checkpoints
    from next_core.storage import json_text

    if not 0 < alpha < math.inf:
        raise ConfigError(f"--alpha must be a number above 0 (got {alpha:g})")
    if horizon < 1:
        raise ConfigError(f"--horizon must be at least 1 (got {horizon})")
    if applier == "live":
        raise ConfigError("the applier 'live' changes a model in memory; use peft-adapter or merged-model")
    if out.exists() and not dry_run:
        raise ConfigError(f"{out} exists already; choose another folder or remove it")
    if not dry_run and out.exists():
        raise ConfigError(f"{out} exists already; choose another folder or remove it")
    made = make_predictor(predictor, **parse_assignments(fields))
    target = make_applier(applier, **parse_assignments(applier_fields))
    source = open_checkpoints(checkpoints, backbone, layout)
    with Bars() as bars:
        made.progress = bars
        history = History(source, rank, progress=bars)
        prediction = made.fit(history).predict(horizon)
    if prediction.abstention is not None:
        raise CheckpointError(f"{predictor} predicts nothing from {checkpoints}: {prediction.abstention}")
    if strict and prediction.abstained:
        name, reason = next(iter(prediction.abstained.items()))
        raise GuardError(f"{len(prediction.abstained)} matrices abstain, among them '{name}': {reason}")
    norm = jump_norm(prediction, alpha, history)
    if not dry_run:
        target.apply(prediction, alpha, out=out)
    facts: dict[str, Any] = {
        "checkpoints": str(checkpoints),
        "layout": source.name,
        "steps": list(source.steps),
        "predictor": predictor,
        "horizon": horizon,
        "alpha": alpha,
        "rank": rank,
        "moved": len(prediction.updates),
        "abstained": dict(prediction.abstained),
        "skipped": dict(source.skipped),
        "norm": norm.jump,
        "norm_ratio": norm.ratio,
        "diagnostics": dict(prediction.diagnostics),
        "applier": applier,
        "out": None if dry_run else str(out),
    }
    console = Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{source.name}: {len(source.steps)} checkpoints, steps {source.steps[0]} to {source.steps[-1]}; "
        f"{predictor} moved {len(prediction.updates)} matrices by {horizon} steps, "
        f"{norm.ratio:.2f} times the recent motion"
    )
    for name, reason in prediction.abstained.items():
        console.print(f"  stays: {name}: {reason}")
    console.print("nothing written (--dry-run)" if dry_run else f"written: {out} ({applier})")
    if as_json:
        print(json_text(facts))

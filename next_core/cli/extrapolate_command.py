"""``next-core extrapolate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from next_core.cli.console import Output, progress_bars
from next_core.cli.options import Json, PluginOptions, RunOptions, expand_options, show_source, trouble
from next_core.errors import CheckpointError, GuardError, contradiction, invalid_value

if TYPE_CHECKING:
    from next_core.interfaces import Applied, Prediction

MOST_UNCHANGED = 8


@expand_options
def extrapolate(
    run: RunOptions,
    out: Annotated[Path, Option(help="Folder for the extrapolated weights; must not exist")],
    horizon: Annotated[int, Option(min=1, help="RL steps past the newest checkpoint")],
    plugins: PluginOptions,
    alpha: Annotated[float, Option(help="Factor on the length of the jump")] = 1.0,
    alphas: Annotated[str | None, Option(metavar="A,B,...", help="Write a folder in --out for each factor")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Predict and print the result; write nothing")] = False,
    strict: Annotated[bool, Option("--strict", help="Exit with 4 when the predictor abstains for a matrix")] = False,
    as_json: Json = False,
) -> None:
    """Extrapolate recorded checkpoints and write the predicted weights."""
    from next_core.appliers.folder_applier import FolderApplier, WrittenFolder, apply_sweep
    from next_core.appliers.folder_contents import from_backbone
    from next_core.cycle.jump import jump_norm
    from next_core.plugins import make_applier
    from next_core.sources.precision import rounding_warnings

    scales = _scales(alpha, alphas)
    predictor = plugins.make_predictor()
    source = run.source()
    name, fields = plugins.applier_and_fields(source)
    applier = make_applier(name, **fields)
    if not applier.writes_folders:
        raise invalid_value(f"the applier '{applier.name}' changes a model in memory; use peft-adapter or merged-model")
    if alphas is not None and not isinstance(applier, FolderApplier):
        raise contradiction(f"--alphas needs an applier that writes new folders; '{applier.name}' does not")
    output = Output(as_json)
    if isinstance(applier, FolderApplier):
        applier.check_source(source, out, dry_run)  # before the work
    facts = show_source(run, source, output)
    warnings = rounding_warnings(source)
    for warning in warnings:
        output.print(f"  warning: {warning}")
    with progress_bars() as progress:
        predictor.progress = applier.progress = progress
        history = run.history(source, plugins.rank, progress)
        prediction = predictor.fit(history).predict(horizon)
        _check_abstentions(prediction, plugins.predictor, strict)
        norm, ratio = jump_norm(prediction, alpha, history)
        written: Mapping[float, Applied] = {}
        if not dry_run and alphas is None:
            written = {alpha: applier.apply(prediction, alpha, out=out)}
        elif not dry_run:
            written = apply_sweep(applier, prediction, scales, out)
    facts |= {
        "warnings": warnings,
        "predictor": plugins.predictor,
        "horizon": horizon,
        "alpha": alpha if alphas is None else scales,
        "rank": plugins.rank,
        "moved": len(prediction.moving),
        "moved_share": prediction.moved_share,
        "abstained": dict(prediction.abstained),
        "norm": norm,
        "norm_ratio": ratio,
        "diagnostics": dict(prediction.diagnostics),
        "applier": applier.name,
        "out": None if dry_run else str(out),
        "share_landed": {f"{scale:g}": getattr(applied, "share", None) for scale, applied in written.items()},
    }
    _show(facts, prediction.moved(), trouble(history), output)
    records = [applied.record for applied in written.values() if isinstance(applied, WrittenFolder)]
    if records and records[0].get("from_backbone"):
        output.print(f"  {from_backbone(records[0])}")
    output.json(facts)


def _check_abstentions(prediction: Prediction, predictor: str, strict: bool) -> None:
    """Raise ``CheckpointError`` if nothing is predicted, ``GuardError`` with ``strict`` if a matrix is not."""
    if prediction.abstention is not None:
        raise CheckpointError(f"{predictor} predicts nothing: {prediction.abstention}", kind="predictor-abstained")
    if strict and prediction.abstained:
        name, reason = next(iter(prediction.abstained.items()))
        message = f"{predictor} abstains for {len(prediction.abstained)} matrices, among them '{name}': {reason}"
        raise GuardError(message, kind="predictor-abstained")


def _show(facts: Mapping[str, Any], moved: str, notes: Sequence[str], output: Output) -> None:
    output.print(
        f"{facts['predictor']} extrapolated {moved} by {facts['horizon']} steps; the norm of the jump is "
        f"{facts['norm_ratio']:.2f} times that of the update over the last {facts['horizon']} steps"
    )
    unchanged = [f"  unchanged: {name}: {reason}" for name, reason in facts["abstained"].items()]
    output.list(unchanged, MOST_UNCHANGED, "  unchanged")
    for note in notes:
        output.print(f"  note: {note}")
    out = facts["out"]
    output.print("nothing written (--dry-run)" if out is None else f"written: {out} ({facts['applier']})")
    for scale, share in facts["share_landed"].items():
        if share is not None:
            output.print(f"  alpha {scale}: {share:.1%} of the jump remains after rounding to the stored precision")


def _scales(alpha: float, alphas: str | None) -> list[float]:
    """Return the factors that ``--alpha`` or ``--alphas`` asks for. Raises ``ConfigError``."""
    from next_core.appliers.folder_applier import folder_names

    if alphas is None:
        if not 0 < alpha < math.inf:
            raise invalid_value(f"--alpha must be a number above 0 (got {alpha:g})")
        return [alpha]
    if alpha != 1.0:
        raise contradiction("--alpha and --alphas contradict; omit one of them")
    try:
        scales = [float(part) for part in alphas.split(",")]
    except ValueError:
        raise invalid_value(f"--alphas takes numbers separated by commas, such as 0.5,1,2 (got {alphas})") from None
    folder_names(scales)
    return scales

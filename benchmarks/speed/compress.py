"""Stages: the rank-1 components of every delta of a LoRA run, read from adapters on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import reference, synthetic
from benchmarks.speed.clock import apart, best_of, cold
from benchmarks.speed.reference import Span
from benchmarks.speed.stage import Options, Result, Row, stage
from benchmarks.speed.synthetic import HORIZON, LoraRun

KINDS = ("global", "local", "target")


@stage("compress-0.5B")
def compress_05b(options: Options) -> Result:
    """Six layers of Qwen2.5-0.5B, the deltas and the inner products; the reference's accuracy beside ours."""
    run = LoraRun(replace(synthetic.QWEN_05B, layers=6), distinct=6)
    return _compress(options, run, repeats=3, targets={"target_cpu_s": 4.0}, grams=True, sample=KINDS)


@stage("compress-1.5B")
def compress_15b(options: Options) -> Result:
    """All layers of Qwen2.5-1.5B from the factors alone."""
    return _compress(options, LoraRun(synthetic.QWEN_15B), repeats=2, targets={"target_cpu_s": 40.0})


@stage("compress-7B")
def compress_7b(options: Options) -> Result:
    """All layers of Qwen2.5-7B from the factors alone."""
    targets = {"target_cpu_s": 25.0, "target_gib": 6.0}
    return _compress(options, LoraRun(synthetic.QWEN_7B), repeats=1, targets=targets)


def _compress(
    options: Options,
    run: LoraRun,
    repeats: int,
    targets: dict[str, float],
    grams: bool = False,
    sample: tuple[str, ...] = ("local",),
) -> Result:
    if options.toy:
        run = replace(run, shapes=synthetic.TOY, rank=4)
    here = not options.toy
    all_spans, matrices = reference.different_spans(run.steps), run.shapes.matrices()
    chosen = {name: [reference.spans(run.steps)[kind][-1] for kind in sample] for name in _one_of_each_shape(run)}
    with options.folder() as folder:
        run.write(folder / "checkpoints")
        measured, memory = apart(measure_components, folder / "checkpoints", chosen, repeats, fresh=here)
        wanted = dict.fromkeys(matrices, all_spans) if options.full else chosen
        dense, _ = apart(reference.dense_svds, folder / "checkpoints", wanted, fresh=here)
        more = [_grams(options, run, folder / "checkpoints")] if grams else []
    count = measured.pop("components")
    row: Row = {"what": f"rank-1 components of {count} deltas of {len(matrices)} matrices"}
    row |= {key: measured[key] for key in ("cpu_s", "wall_s", "runs_cpu_s", "cold")} | memory | targets
    row["floor"] = options.rates.floor(row["cpu_s"], "fp64", _flops(run), run.factor_bytes)
    row["errors"] = reference.worst(
        reference.errors(tuple(map(torch.as_tensor, found)), tuple(map(torch.as_tensor, measured["exact"][key])))
        for key, found in measured["sample"].items()
    )
    row["reference"] = _dense_row(dense, run, wanted, options.full, measured["exact"])
    return Result(_setting(run, count), [row, *more])


def measure_components(folder: Path, sample: dict[str, list[Span]], repeats: int) -> dict[str, Any]:
    """What opening the run and compressing all its deltas costs; of the sample, the triplets and the exact ones."""
    from next_core import open_checkpoints

    components(LoraRun(synthetic.TOY, rank=4).write(folder.parent / "warm-up"))  # late imports, BLAS's first call
    row, history = best_of(repeats, lambda: components(folder))
    row["cold"] = cold(folder, lambda: components(folder), row)
    kinds = reference.spans(history.steps)
    found, exact = {}, {}
    source = open_checkpoints(folder)
    for name, chosen in sample.items():
        for step, since in chosen:
            kind = next(kind for kind in ("global", "target", "local") if (step, since) in kinds[kind])
            factors = history.components(kind, HORIZON if kind == "target" else None)[name]
            at = kinds[kind].index((step, since))
            found[name, (step, since)] = _numpy(factors.U[at, :, 0], factors.S[at, 0], factors.V[at, :, 0])
            earlier = None if since is None else source.factors(name, since)
            exact[name, (step, since)] = _numpy(*reference.exact_triplet(source.factors(name, step), earlier))
    count = sum(
        factors.S.shape[0]
        for kind in KINDS
        for factors in history.components(kind, HORIZON if kind == "target" else None).values()
    )
    return row | {"components": count, "sample": found, "exact": exact}


def components(folder: Path, horizon: int = HORIZON) -> Any:
    from next_core import History, open_checkpoints

    history = History(open_checkpoints(folder), rank=1)
    history.compress(*KINDS, horizon=horizon)  # type: ignore[arg-type]
    for kind in KINDS:
        history.components(kind, horizon if kind == "target" else None)  # type: ignore[arg-type]
    return history


def _grams(options: Options, run: LoraRun, folder: Path) -> Row:
    measured, memory = apart(measure_grams, folder, fresh=not options.toy)
    row: Row = {"what": f"inner products of all {len(run.steps)} global deltas, each matrix"} | measured | memory
    pairs = len(run.steps) ** 2 / 2  # blocks <s, t> and <t, s> are one, a block <t, t> is symmetric
    flops = sum(2 * pairs * (m + n) * run.rank**2 for m, n in run.shapes.matrices().values())
    row["floor"] = options.rates.floor(row["cpu_s"], "fp64", flops, run.factor_bytes)
    return row


def measure_grams(folder: Path) -> dict[str, Any]:
    """What opening the run and taking every matrix's Gram matrix over time costs."""
    from next_core import History, open_checkpoints

    return best_of(3, lambda: History(open_checkpoints(folder)).grams())[0]


def _numpy(*tensors: Any) -> tuple[Any, ...]:
    return tuple(tensor.double().numpy() for tensor in tensors)


def _one_of_each_shape(run: LoraRun) -> list[str]:
    by_shape = {shape: name for name, shape in reversed(run.shapes.matrices().items())}
    return sorted(by_shape.values())


def _flops(run: LoraRun) -> float:
    """Gram blocks B_t^T B_s and A_t A_s^T for the lags 0, one step and the horizon; then u and v of every delta.

    2 (m + n) r^2 a block, half of that where t = s, for it is symmetric; 2 (m + n) r for the vectors of a delta from
    the backbone, twice that for one between checkpoints. The small r x r matrices are not counted.
    """
    different = reference.different_spans(run.steps)
    between = sum(since is not None for _, since in different)
    blocks = len(run.steps) / 2 + between
    vectors = len(different) + between
    each = 2 * blocks * run.rank**2 + 2 * vectors * run.rank
    return sum(each * (m + n) for m, n in run.shapes.matrices().values())


def _dense_row(dense: dict[str, Any], run: LoraRun, wanted: dict[str, list[Span]], full: bool, exact: Any) -> Row:
    shapes = run.shapes.matrices()
    svds = len(reference.different_spans(run.steps))
    total = reference.extrapolated(dense["costs"], shapes.values(), len(run.steps), svds)
    done, of = sum(map(len, wanted.values())), svds * len(shapes)
    row: Row = {"what": "merge in fp32, subtract, full SVD of each delta", "cpu_s": float(f"{total:.4g}")}
    row["how"] = f"measured, {of} SVDs" if full else f"estimated from {done} of {of} SVDs, at least one of each shape"
    row["errors"] = reference.worst(
        reference.errors(tuple(map(torch.as_tensor, dense["triplets"][key])), tuple(map(torch.as_tensor, exact[key])))
        for key in exact
    )
    return row


def _setting(run: LoraRun, components: int) -> dict[str, Any]:
    matrices = run.shapes.matrices()
    return {
        "matrices": len(matrices),
        "hidden": run.shapes.hidden,
        "intermediate": run.shapes.intermediate,
        "kv": run.shapes.kv,
        "layers": run.shapes.layers,
        "layers_of_different_numbers": min(run.distinct, run.shapes.layers),
        "rank": run.rank,
        "checkpoints": len(run.steps),
        "deltas_per_matrix": {kind: len(found) for kind, found in reference.spans(run.steps).items()},
        "different_deltas_per_matrix": len(reference.different_spans(run.steps)),
        "components": components,
        "factors_gb": round(run.factor_bytes / 1e9, 3),
    }

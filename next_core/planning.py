"""What a run or an extrapolation would read, compute and write, from names, shapes and file sizes; no weight is read.

Counts and bytes are exact unless stated otherwise. Seconds are counts divided by rates that are measured on this
machine in a fraction of a second, so they are right to a factor of about two.
"""

from __future__ import annotations

import itertools
import re
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from next_core.appliers.merged_model import model_layout
from next_core.config import with_model_folder
from next_core.cycle.retention import Retention
from next_core.errors import CheckpointError, ConfigError, contradiction, invalid_value
from next_core.interfaces import CheckpointSource
from next_core.plugins import make_chosen
from next_core.predictor import TrajectoryPredictor, Work
from next_core.run_config import LoraSettings, RunConfig
from next_core.sources.hf_model import ModelFiles
from next_core.sources.matrices import stored_name
from next_core.step_predictor import StepPredictor
from next_core.storage.atomic import free_bytes
from next_core.types import Parameter, Span

_ITERATIONS = 20  # Lanczos iterations that a core, or a dense delta, usually takes
_SMALL = 3  # Products of small matrices take so many times as long as moving their bytes
_LIBRARIES = 350 * 2**20  # Memory of torch and other libraries before any work


@dataclass(frozen=True)
class Rates:
    """One core of this machine, per second: FLOPs of thin fp64 products, bytes copied, FLOPs of fp32 layers."""

    flops: float
    bytes: float
    single_flops: float

    @classmethod
    def measure(cls) -> Rates:
        thin = torch.ones(4096, 64, dtype=torch.float64)
        large, copy = torch.ones(2**24), torch.ones(2**24)
        layer, batch = torch.ones(1024, 256), torch.ones(128, 1024)
        tasks = (lambda: thin.T @ thin, lambda: copy.copy_(large), lambda: batch @ layer)
        product, moved, single = (min(timeit.repeat(task, number=1, repeat=5)) for task in tasks)
        return cls(2 * 4096 * 64 * 64 / product, 2 * large.nbytes / moved, 2 * 1024 * 256 * 128 / single)

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.bytes / self.bytes + work.single_flops / self.single_flops


MEANS, STATE = 3, 3  # The running means of step scaling, and a state to return to: so many times the trained weights
Plan = dict[str, Any]  # Sections of figures (`read`, `compute`, `write`, `memory`, `time`), and `notes`: plain objects


def plan_checkpoints(
    source: CheckpointSource,
    predictor: TrajectoryPredictor,
    horizon: int,
    *,
    rank: int = 1,
    applier: str | None = None,
    applier_fields: Mapping[str, Any] | None = None,
    out: Path | None = None,
) -> Plan:
    """Plan an extrapolation of checkpoints. Raises ``ConfigError`` for a horizon or rank below 1, or no backbone."""
    if min(horizon, rank) < 1:
        raise invalid_value(f"horizon and rank must be at least 1 (got {horizon} and {rank})")
    steps, gram = source.steps, "gram" in predictor.requires
    matrices = {parameter: source.precision(parameter.name).itemsize for parameter in source.parameters}
    spans, decompose, fit = predictor_work(predictor, matrices, steps, horizon, rank)
    applier = applier or source.applier
    written, what = _written(source, applier, dict(applier_fields or {}), predictor, rank)
    free = None if out is None else free_bytes(out)
    reason = predictor.why_not(steps, horizon) if steps else "no checkpoint"
    nothing = [] if reason is None else [f"{predictor.name} would predict nothing: {reason}"]
    largest = max(matrices, key=_stored)
    return {
        "read": {
            "layout": source.name,
            "checkpoints": len(steps),
            "steps": list(steps),
            "matrices": len(matrices),
            "bytes a checkpoint": sum(_stored(p) * size for p, size in matrices.items()),
            "bytes": sum(_reads(p, spans, len(steps), gram) * _stored(p) * size for p, size in matrices.items()),
            "skipped": dict(source.skipped),
        },
        "compute": {
            "predictor": predictor.name,
            "horizon": horizon,
            "deltas": len(spans) * len(matrices),
            "inner products": gram,
            "flops": decompose.flops + fit.flops + fit.single_flops,
        },
        "write": {"applier": applier, "what": what, "bytes": written, "free": free},
        "memory": {
            "bytes": _memory(list(matrices), spans, len(steps), rank),
            "largest matrix": f"{largest.name} {largest.shape[0]} x {largest.shape[1]}",
        },
        "time": _seconds(decompose, fit, written or 0),
        "notes": [*source.notes, *nothing, *_full_disk(out, written or 0, free)],
    }


def plan_run(config: RunConfig, out: Path) -> Plan:
    """Plan a run of the cycle, except the seconds of its RL steps: nothing shows their cost beforehand."""
    notes, parameters = ["the seconds of RL are not known beforehand; jumps cost no RL step"], list[Parameter]()
    try:
        config = with_model_folder(config, online=False)
        parameters = trained_parameters(config)
    except (CheckpointError, ConfigError) as error:  # transformers may read what is not read here, or download it
        notes.insert(0, f"the sizes of the model are not known, nor what follows from them: {error.message}")
    schedule, dense = config.schedule, config.training.lora is None
    predictor, matrices = make_chosen("predictor", config.predictor), dict.fromkeys(parameters, 4)
    scaling = isinstance(predictor, StepPredictor)
    jumps = [] if scaling else schedule.attempt_steps(config.steps)[: schedule.jumps]
    each = sum(4 * _stored(p) for p in parameters)
    observed, shifts = (0, 0) if scaling else (config.steps // schedule.every + 1, len(jumps))
    spans, deltas, decompose, fit = list[Span](), 0, Work(), Work()
    for jump in jumps:
        steps = range(schedule.every, jump + 1, schedule.every)
        some, *work = predictor_work(predictor, matrices, steps, schedule.horizon, config.rank)
        spans, deltas = max(spans, some, key=len), deltas + len(some) * len(parameters)
        decompose, fit = decompose + work[0], fit + work[1]
    saves = [] if config.save_every is None else [*range(config.save_every, config.steps + 1, config.save_every)]
    if isinstance(predictor, TrajectoryPredictor) and schedule.keep == "needed":
        retention = Retention.of(predictor, schedule, config.guards, config.steps)
        observed, shifts = retention.most(jumps, saves)
        if retention.reads is None:
            notes.append(f"keep: needed deletes nothing before the last jump: '{predictor.name}' reads all checkpoints")
    backend = make_chosen("backend", config.backend)
    trainer = dict(backend.describe(config, out))
    # A backend in this process writes the two states, and those of the newest checkpoint, into the run's folder, one
    # after the other. Another holds two in memory and writes them into each checkpoint.
    state, inside = STATE * scaling, backend.in_process
    written = {
        "checkpoints": observed,
        "bytes a checkpoint": each,
        "bytes of checkpoints": observed * each,
        # A jump keeps what every past checkpoint moves by; a recovery window also what was there before it.
        "bytes of jumps": shifts * each * (1 if config.guards.recovery is None else 2),
        "bytes of the trainer's": len(saves) * (3 + MEANS * scaling + (not inside) * 2 * state) * each,
        "bytes of states to return to": inside * (4 if saves else 2) * state * each,
    }
    total, free = sum(value for key, value in written.items() if key.startswith("bytes of")), free_bytes(out)
    needed = _memory(parameters, spans, observed, config.rank)
    if scaling:
        notes[-1] = "the seconds of RL are not known beforehand; scaling its steps costs no RL step"
        needed = (MEANS + (1 if inside else 2) * state) * each
    needed += 2 * each if dense and jumps else 0  # a full-parameter jump holds what was there and what it becomes
    return {
        "read": {"model": str(config.training.model), "trained": "all parameters" if dense else "LoRA"},
        "compute": {
            "steps": config.steps,
            "backend": config.backend.name,
            "algorithm": config.training.algorithm,
            "predictor": config.predictor.name,
            "roll-outs": config.steps * config.training.prompts_per_step * config.training.generations,
            "jumps after": jumps,
            "matrices": len(parameters),
            "deltas": deltas,
            "control": config.control,
            **({"trainer": trainer} if trainer else {}),
        },
        "write": {"out": str(out), **written, "bytes": total, "free": free},
        "memory": {"bytes": needed, "besides": "the trainer's own"},
        "time": {**_seconds(decompose, fit, total), "RL": None},
        "notes": [*_full_disk(out, total, free), *notes],
    }


def predictor_work(
    predictor: TrajectoryPredictor, matrices: Mapping[Parameter, int], steps: Sequence[int], horizon: int, rank: int
) -> tuple[list[Span], Work, Work]:
    """Return the deltas that a prediction has decomposed, what that and inner products take, and what fitting takes.

    ``matrices`` have the bytes of one of their numbers.
    """
    spans, work = spans_read(predictor, steps, horizon), Work()
    for parameter, size in matrices.items():
        work += compress_work(parameter, spans, rank, size)
        if "gram" in predictor.requires:
            work += gram_work(parameter, len(steps), size)
    return spans, work, predictor.work({p.name: p.shape for p in matrices}, steps, horizon, rank)


def spans_read(predictor: TrajectoryPredictor, steps: Sequence[int], horizon: int) -> list[Span]:
    """Return the deltas whose components a predictor reads, given checkpoints at these steps."""
    spans: list[Span] = []
    if "global" in predictor.requires or "target" in predictor.requires:  # global ones give the signs
        spans += [(step, None) for step in steps]
    if "local" in predictor.requires:
        spans += [(later, earlier) for earlier, later in itertools.pairwise(steps)]
    if "target" in predictor.requires:
        spans += [(step + horizon, step) for step in steps if step + horizon in steps]
    return list(dict.fromkeys(spans))


def compress_work(parameter: Parameter, spans: Sequence[Span], rank: int, itemsize: int) -> Work:
    """Count the rank-k triplets of some deltas of one matrix."""
    (m, n), r = parameter.shape, parameter.rank
    if not spans:
        return Work()
    if r is None:
        passes = Work(bytes=4.0 * m * n).times(_ITERATIONS)  # memory is what they wait for
        return (passes + Work(bytes=(2 * itemsize + 12.0) * m * n)).times(len(spans))
    steps = {step for span in spans for step in span if step is not None}
    blocks = {(t, t) for t in steps} | {span for span in spans if span[1] is not None}
    products = Work(2.0 * r * r * (m + n)).times(len(blocks))
    triplets = Work(2.0 * 2 * r * rank * (m + n)).times(len(spans))
    cores = Work(bytes=_SMALL * _ITERATIONS * 2 * 8.0 * (2 * r) ** 2).times(len(spans))
    return products + triplets + cores + Work(bytes=(itemsize + 16.0) * r * (m + n)).times(len(steps))


def gram_work(parameter: Parameter, count: int, itemsize: int) -> Work:
    """Count all inner products of the deltas of one matrix at ``count`` checkpoints."""
    (m, n), r = parameter.shape, parameter.rank
    if r is None:
        return Work(2.0 * m * n * count**2, (2 * itemsize + 16.0) * m * n * count)
    pairs = count * (count + 1) / 2
    return Work(2.0 * r * r * (m + n) * pairs, (itemsize + 16.0) * r * (m + n) * count)


def trained_parameters(config: RunConfig) -> list[Parameter]:
    """Return the matrices that a run would train, from the headers of its base model."""
    lora, shapes = config.training.lora, ModelFiles(config.training.model).matrices
    if lora is None:
        return [Parameter(name, shape) for name, shape in sorted(shapes.items())]
    return [Parameter(name, shape, lora.rank) for name, shape in sorted(shapes.items()) if _targeted(name, lora)]


def _targeted(name: str, lora: LoraSettings) -> bool:
    """Whether PEFT would put an adapter on a weight."""
    module, targets = name.removesuffix(".weight"), lora.target_modules
    if name != stored_name(name):  # one of a stack, which is no layer
        return False
    if targets == "all-linear":
        return not module.endswith(("embed_tokens", "lm_head", "wte", "wpe"))
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _written(
    source: CheckpointSource, applier: str, fields: dict[str, Any], predictor: TrajectoryPredictor, rank: int
) -> tuple[int | None, str]:
    """Return the bytes that an applier would write, None where that is not known beforehand, and what they are."""
    parameters = source.parameters
    if applier == "peft-adapter":
        if any(p.rank is None for p in parameters):
            raise contradiction("the applier 'peft-adapter' needs a run of LoRA adapters; use 'merged-model'")
        in_factors = getattr(predictor.config, "space", None) == "factors"
        grown = 0 if in_factors else rank
        ranks = [min(fields.get("rank") or 2**31, (p.rank or 0) + grown) for p in parameters]
        size = sum(4 * r * sum(p.shape) for p, r in zip(parameters, ranks, strict=True))
        return size, "an adapter" + ("" if in_factors else f" (at least rank r + {rank}, fp32)")
    if applier == "merged-model":
        layout = model_layout(source, fields.get("backbone"))
        return sum(file.path.stat().st_size for file in ModelFiles(layout).files), "a whole model"
    return None, "not known beforehand"


def _stored(parameter: Parameter) -> int:
    """Return how many numbers a checkpoint stores of a matrix."""
    m, n = parameter.shape
    return m * n if parameter.rank is None else parameter.rank * (m + n)


def _reads(parameter: Parameter, spans: Sequence[Span], steps: int, gram: bool) -> int:
    """Return how often a matrix of a checkpoint is read."""
    if parameter.rank is None:  # every delta reads its two ends
        return 2 * (len(spans) + (steps if gram else 0)) + 2
    read = {step for span in spans for step in span if step is not None}
    return (len(read) if spans else 0) + (steps if gram else 0) + min(steps, 2)


def _memory(parameters: Sequence[Parameter], spans: Sequence[Span], steps: int, rank: int) -> int:
    """Return the bytes of what is kept (the components) and of the largest matrix at work."""
    kept, largest = 0, 0
    for (m, n), r in ((parameter.shape, parameter.rank) for parameter in parameters):
        kept += 8 * rank * (m + n) * len(spans)  # aligned, one copy
        if r is None:
            work = 16 * m * n
        else:
            work = 8 * r * (m + n) * (steps + 1) + 2 * 8 * r * r * 3 * steps + 3 * 2 * 8 * (2 * r) ** 2 * len(spans)
        largest = max(largest, work)
    return _LIBRARIES + kept + largest


def _seconds(decompose: Work, fit: Work, written: int) -> dict[str, float]:
    rates = Rates.measure()
    parts = {"compress": decompose, "fit": fit, "write": Work(bytes=2.0 * written)}
    return {name: rates.seconds(work) for name, work in parts.items()}


def _full_disk(out: Path | None, needed: int, free: int | None) -> list[str]:
    full = free is not None and needed > free
    return [f"the disk of {out} has {gib(free or 0)} free, {gib(needed)} are needed"] if full else []


def gib(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:  # three digits
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"

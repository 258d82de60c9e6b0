"""What a piece of work would read, compute and write, from names, shapes and file sizes alone; no weight is read.

Counts and bytes are exact where nothing else is said. Seconds are the counts over rates that are measured on this
machine while planning (a fraction of a second), so they are right to a factor of about two.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from next_core.backend import Backend
from next_core.errors import CheckpointError, ConfigError
from next_core.interfaces import CheckpointSource
from next_core.plugins import make_chosen
from next_core.predictor import TrajectoryPredictor, Work
from next_core.run_config import LoraSettings, RunConfig
from next_core.sources.hf_model import ModelFiles
from next_core.storage.atomic import free_bytes
from next_core.types import Parameter, Span

_ITERATIONS = 20
"""Lanczos iterations that a core, or a dense delta, takes as a rule."""
_SMALL = 3
"""Products of small matrices take so many times what their bytes would."""
_LIBRARIES = 350 * 2**20
"""What torch and the rest take before any work."""


@dataclass(frozen=True)
class Rates:
    """One core of this machine: thin fp64 products, copying from memory to memory, fp32 products of layers' widths."""

    flops: float
    bytes: float
    single_flops: float

    @classmethod
    def measure(cls) -> Rates:
        thin = torch.ones(4096, 64, dtype=torch.float64)
        large, copy = torch.ones(2**24), torch.ones(2**24)
        flops = 2 * 4096 * 64 * 64 / _fastest(lambda: thin.T @ thin)
        layer, batch = torch.ones(1024, 256), torch.ones(128, 1024)
        single = 2 * 1024 * 256 * 128 / _fastest(lambda: batch @ layer)
        return cls(flops, 2 * large.nbytes / _fastest(lambda: copy.copy_(large)), single)

    def seconds(self, work: Work) -> float:
        return work.flops / self.flops + work.bytes / self.bytes + work.single_flops / self.single_flops


@dataclass(frozen=True)
class ResourcePlan:
    """Sections of figures (``read``, ``compute``, ``write``, ``memory``, ``time``), and ``notes`` to know besides."""

    read: Mapping[str, Any] = field(default_factory=dict)
    compute: Mapping[str, Any] = field(default_factory=dict)
    write: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    time: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it, for ``--json``."""
        return {name: list(value) if name == "notes" else dict(value) for name, value in asdict(self).items()}


def plan_checkpoints(
    source: CheckpointSource,
    predictor: TrajectoryPredictor,
    horizon: int,
    *,
    rank: int = 1,
    applier: str = "peft-adapter",
    applier_fields: Mapping[str, Any] | None = None,
    out: Path | None = None,
) -> ResourcePlan:
    """What extrapolating these checkpoints would take. Raises ``ConfigError`` for a horizon below 1."""
    if horizon < 1:
        raise ConfigError(f"horizon must be at least 1 (got {horizon})", kind="config-invalid-value")
    parameters, steps = source.parameters, source.steps
    spans = spans_read(predictor, steps, horizon)
    work = sum((compress_work(p, spans, rank, source.precision(p.name).itemsize) for p in parameters), Work())
    if "gram" in predictor.requires:
        work += sum((gram_work(p, len(steps), source.precision(p.name).itemsize) for p in parameters), Work())
    written, what = _written(source, applier, dict(applier_fields or {}), predictor, rank)
    notes = list(source.notes)
    reason = predictor.why_not(steps, horizon) if steps else "no checkpoint"
    if reason is not None:
        notes.append(f"{predictor.name} would predict nothing: {reason}")
    free = None if out is None else free_bytes(out)
    if written is not None and free is not None and written > free:
        notes.append(f"the disk of {out} has {gib(free)} free, {gib(written)} are needed")
    stored = sum(_stored(p) * source.precision(p.name).itemsize for p in parameters)
    read = sum(_reads(p, spans, len(steps), "gram" in predictor.requires) * _stored(p) for p in parameters)
    fit = predictor.work({p.name: p.shape for p in parameters}, steps, horizon, rank)
    return ResourcePlan(
        read={
            "layout": source.name,
            "checkpoints": len(steps),
            "steps": list(steps),
            "matrices": len(parameters),
            "bytes a checkpoint": stored,
            "bytes": read * source.precision(parameters[0].name).itemsize if parameters else 0,
            "skipped": dict(source.skipped),
        },
        compute={
            "predictor": predictor.name,
            "horizon": horizon,
            "deltas": len(spans) * len(parameters),
            "inner products": "gram" in predictor.requires,
            "flops": work.flops + fit.flops + fit.single_flops,
        },
        write={"applier": applier, "what": what, "bytes": written, "free": free},
        memory={"bytes": _memory(parameters, spans, len(steps), rank), "largest matrix": _largest(parameters)},
        time=_seconds(compress=work, fit=fit, write=Work(bytes=2.0 * (written or 0))),
        notes=notes,
    )


def plan_run(config: RunConfig, out: Path) -> ResourcePlan:
    """What a run of the cycle would take, the RL steps themselves excepted: nothing tells their cost beforehand."""
    parameters: list[Parameter] = []
    notes: list[str] = []
    try:
        parameters = trained_parameters(config)
    except CheckpointError as error:  # transformers may read what is not read here
        notes.append(f"the sizes of the model are not known, nor what follows from them: {error}")
    schedule = config.schedule
    attempts = schedule.attempt_steps(config.steps)
    jumps = attempts if schedule.limit == float("inf") else attempts[: int(schedule.limit)]
    checkpoints = config.steps // schedule.every + 1
    each = sum(4 * _stored(p) for p in parameters)
    predictor: TrajectoryPredictor = make_chosen("predictor", config.predictor)
    work = fit = Work()
    largest: list[Span] = []
    for step in jumps:
        steps = range(schedule.every, step + 1, schedule.every)
        spans = spans_read(predictor, steps, schedule.horizon)
        largest = max(largest, spans, key=len)
        work += sum((compress_work(p, spans, config.rank, 4) for p in parameters), Work())
        if "gram" in predictor.requires:
            work += sum((gram_work(p, len(steps), 4) for p in parameters), Work())
        fit += predictor.work({p.name: p.shape for p in parameters}, steps, schedule.horizon, config.rank)
    dense = config.training.lora is None
    backend: Backend = make_chosen("backend", config.backend)
    trainer = dict(backend.describe(config, out))
    written = {
        "checkpoints": checkpoints,
        "bytes a checkpoint": each,
        "bytes of checkpoints": checkpoints * each,
        # A jump keeps what every past checkpoint moves by; a recovery window also what was there before it.
        "bytes of jumps": len(jumps) * each * (1 if config.guards.recovery is None else 2),
        "bytes of the trainer's": 0 if config.save_every is None else (config.steps // config.save_every) * 3 * each,
    }
    total = sum(value for key, value in written.items() if key.startswith("bytes of"))
    free = free_bytes(out)
    if total > free:
        notes.append(f"the disk of {out} has {gib(free)} free, {gib(total)} are needed")
    return ResourcePlan(
        read={"model": str(config.training.model), "trained": "all parameters" if dense else "LoRA"},
        compute={
            "steps": config.steps,
            "backend": config.backend.name,
            "algorithm": config.training.algorithm,
            "predictor": config.predictor.name,
            "roll-outs": config.steps * config.training.prompts_per_step * config.training.generations,
            "jumps after": jumps,
            "matrices": len(parameters),
            "deltas": sum(
                len(spans_read(predictor, range(schedule.every, step + 1, schedule.every), schedule.horizon))
                for step in jumps
            )
            * len(parameters),
            "control": config.control,
            **({"trainer": trainer} if trainer else {}),
        },
        write={"out": str(out), **written, "bytes": total, "free": free},
        memory={
            # A full-parameter jump holds what was there and what it becomes.
            "bytes": _memory(parameters, largest, checkpoints, config.rank) + (2 * each if dense and jumps else 0),
            "besides": "the trainer's own",
        },
        time={**_seconds(compress=work, fit=fit, write=Work(bytes=2.0 * total)), "RL": None},
        notes=[*notes, "the seconds of RL are not known beforehand; jumps cost no RL step"],
    )


def spans_read(predictor: TrajectoryPredictor, steps: Sequence[int], horizon: int) -> list[Span]:
    """The deltas whose components a predictor reads of checkpoints at these steps."""
    spans: list[Span] = []
    if "global" in predictor.requires or "target" in predictor.requires:  # global ones give the signs
        spans += [(step, None) for step in steps]
    if "local" in predictor.requires:
        spans += [(later, earlier) for earlier, later in itertools.pairwise(steps)]
    if "target" in predictor.requires:
        spans += [(step + horizon, step) for step in steps if step + horizon in steps]
    return list(dict.fromkeys(spans))


def compress_work(parameter: Parameter, spans: Sequence[Span], rank: int, itemsize: int) -> Work:
    """The rank-k triplets of some deltas of one matrix."""
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
    """All inner products of the deltas of one matrix at ``count`` checkpoints."""
    (m, n), r = parameter.shape, parameter.rank
    if r is None:
        return Work(2.0 * m * n * count**2, (2 * itemsize + 16.0) * m * n * count)
    pairs = count * (count + 1) / 2
    return Work(2.0 * r * r * (m + n) * pairs, (itemsize + 16.0) * r * (m + n) * count)


def trained_parameters(config: RunConfig) -> list[Parameter]:
    """The matrices a run would train, from the headers of its base model."""
    shapes = {k: (v[0], v[1]) for k, v in ModelFiles(config.training.model).shapes.items() if len(v) == 2}
    lora = config.training.lora
    if lora is None:
        return [Parameter(name, shape) for name, shape in sorted(shapes.items())]
    return [Parameter(name, shape, lora.rank) for name, shape in sorted(shapes.items()) if _targeted(name, lora)]


def _targeted(name: str, lora: LoraSettings) -> bool:
    """Whether PEFT would put an adapter on a weight."""
    module, targets = name.removesuffix(".weight"), lora.target_modules
    if targets == "all-linear":
        return not module.endswith(("embed_tokens", "lm_head", "wte", "wpe"))
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _written(
    source: CheckpointSource, applier: str, fields: dict[str, Any], predictor: TrajectoryPredictor, rank: int
) -> tuple[int | None, str]:
    """Bytes of what an applier of ours would write; None for one that cannot be foretold."""
    parameters = source.parameters
    if applier == "peft-adapter":
        if any(p.rank is None for p in parameters):
            raise ConfigError(
                "the applier 'peft-adapter' needs a run of LoRA adapters; use 'merged-model'",
                kind="config-contradiction",
            )
        in_factors = getattr(predictor.config, "space", None) == "factors"
        grown = 0 if in_factors else rank
        ranks = [min(fields.get("rank") or 2**31, (p.rank or 0) + grown) for p in parameters]
        size = sum(4 * r * sum(p.shape) for p, r in zip(parameters, ranks, strict=True))
        return size, "an adapter" + ("" if in_factors else f" (at least rank r + {rank}, fp32)")
    if applier == "merged-model":
        backbone = fields.get("backbone") or getattr(source.config, "backbone", None)
        if backbone is None:
            raise ConfigError(
                "the applier 'merged-model' needs the base model; pass --backbone FOLDER",
                kind="config-missing-backbone",
            )
        return sum(file.path.stat().st_size for file in ModelFiles(Path(backbone)).files), "a whole model"
    return None, "not known beforehand"


def _stored(parameter: Parameter) -> int:
    """Numbers that a checkpoint stores of a matrix."""
    m, n = parameter.shape
    return m * n if parameter.rank is None else parameter.rank * (m + n)


def _reads(parameter: Parameter, spans: Sequence[Span], steps: int, gram: bool) -> int:
    """How often a whole checkpoint of a matrix is read."""
    if parameter.rank is None:  # every delta reads its two ends
        return 2 * (len(spans) + (steps if gram else 0)) + 2
    read = {step for span in spans for step in span if step is not None}
    return (len(read) if spans else 0) + (steps if gram else 0) + min(steps, 2)


def _largest(parameters: Iterable[Parameter]) -> str:
    largest = max(parameters, key=_stored)
    return f"{largest.name} {largest.shape[0]} x {largest.shape[1]}"


def _memory(parameters: Sequence[Parameter], spans: Sequence[Span], steps: int, rank: int) -> int:
    """What stays (the components) and the largest matrix at work."""
    kept = sum(8 * rank * sum(p.shape) * len(spans) for p in parameters)  # aligned, one copy
    return _LIBRARIES + kept + max((_at_work(p, spans, steps) for p in parameters), default=0)


def _at_work(parameter: Parameter, spans: Sequence[Span], steps: int) -> int:
    (m, n), r = parameter.shape, parameter.rank
    if r is None:
        return 16 * m * n
    cores = 2 * 8 * (2 * r) ** 2 * len(spans)
    return 8 * r * (m + n) * (steps + 1) + 2 * 8 * r * r * 3 * steps + 3 * cores


def _seconds(**parts: Work) -> dict[str, float]:
    rates = Rates.measure()
    return {name: rates.seconds(work) for name, work in parts.items()}


def _fastest(function: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def gib(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"

"""What rounding leaves of the motion between full checkpoints that are stored in bf16 or fp16.

A stored weight is its true value plus a rounding error, about uniform in +-ulp/2 and so of standard deviation
ulp / sqrt(12), where ulp is the spacing of the stored precision at that weight. A difference of two checkpoints carries
both errors. They are independent where weights moved by an ulp or more. A weight that moved by less, |d| < ulp, shows
no motion at all or a whole ulp, the latter with probability |d| / ulp: the mean is right, and the noise's variance is
|d| ulp - d^2, less than that of two independent errors. What is observed then is nearly all noise, and bounds it.

Whether the leading direction of a delta is still to be seen is a matter of random matrices. An m x n matrix of
independent entries of standard deviation s has a largest singular value of about s (sqrt m + sqrt n), and a rank-one
motion of size sigma under it leaves a trace in the leading singular vectors only if sigma > s (m n)^(1/4) (Baik, Ben
Arous and Peche 2005; Benaych-Georges and Nadakuditi, arXiv 1103.2221, section 3.1). Where s differs from entry to
entry, as here, sqrt m and sqrt n become the largest root of a row's and of a column's summed variances (Bandeira and
van Handel, arXiv 1408.6185). A leading direction whose singular value is no larger than that bound may be rounding
alone: it is called drowned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.mathematics.row_blocks import row_blocks
from next_core.sources.tied_weights import EMBEDDINGS, HEADS
from next_core.types import Parameter

LOW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 2**22
"""Elements of a matrix that are looked at together (32 MiB in fp64)."""
ITERATIONS = 16
"""Steps of the power iteration where no singular value is given: it errs towards smaller ones, so towards drowned."""
SAMPLE = 12
"""Matrices of a source that are looked at for its warnings."""
SAMPLED_ROWS = 4096
"""Rows of such a matrix that are looked at, at most."""
PIECE = 256
"""How many of these lie together."""


@dataclass(frozen=True)
class RoundingReport:
    """One matrix between two checkpoints: its motion as stored, and what of that may be rounding.

    ``delta_rms`` is the stored difference's root mean square, ``delta_mean`` its mean absolute value: rounding inflates
    the former and leaves the latter as it is. ``changed`` is the share of weights that differ at all. ``noise_rms`` is
    what two independent rounding errors would have (0 where both ends are fp32). ``delta_to_ulp`` is ``delta_rms``
    over the root mean square of the ulps, infinite without any. ``sigma`` is the largest singular value of the stored
    difference, ``noise_sigma`` the largest that rounding alone may have, ``floor`` the least rank-one motion that
    leaves a trace under it. ``drowned``: ``sigma`` is no larger than ``noise_sigma``.
    """

    name: str
    step: int
    since: int | None
    delta_rms: float
    delta_mean: float
    changed: float
    noise_rms: float
    delta_to_ulp: float
    sigma: float
    noise_sigma: float
    floor: float
    drowned: bool


def ulp(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of a floating-point precision at each weight, in fp64; weights must be of that precision."""
    facts = torch.finfo(dtype)
    _, exponent = torch.frexp(weights.double().abs().clamp_min(facts.smallest_normal))
    return exponent.double().exp2() * (facts.eps / 2)


def rounding_report(
    source: CheckpointSource,
    name: str,
    step: int,
    since: int | None = None,
    sigma: float | None = None,
    most_rows: int | None = None,
) -> RoundingReport:
    """What rounding does to one parameter's delta between two steps (``since=None``: where RL began).

    ``sigma`` is the largest singular value of that delta as stored, where the caller has it; else it is computed, and
    the delta held in fp32 meanwhile. Otherwise memory is bounded by ``BLOCK``. With ``most_rows`` the report is of
    about so many rows, spread over the matrix, as if they were all of it; fewer rows show a motion less well. Raises
    ``CheckpointError`` for a source that reads no full checkpoints, or an unknown parameter.
    """
    shape = next((p.shape for p in source.parameters if p.name == name), None)
    if shape is None:
        raise CheckpointError(f"the run has no parameter '{name}'", kind="checkpoint-not-found")
    blocks = list(_blocks(shape, most_rows))
    m, n = sum(rows.stop - rows.start for rows in blocks), shape[1]
    low = [(model, dtype) for model in map(source.model, (step, since)) if (dtype := model.dtype(name)) in LOW]
    squares = ulps = total = 0.0
    differ = 0
    row_noise, column_squares, column_noise = 0.0, torch.zeros(n).double(), torch.zeros(n).double()
    held, done = torch.empty((m if sigma is None else 0, n)), 0
    for rows in blocks:
        delta = source.delta_rows(name, rows, step, since).double()
        if sigma is None:
            held[done : done + len(delta)] = delta
            done += len(delta)
        total += float(delta.abs().sum())
        differ += int(delta.count_nonzero())
        square, noise = delta.square_(), torch.zeros(delta.shape).double()
        for model, dtype in low:
            noise += ulp(model.read(name, rows), dtype).square_() / 12
        squares += float(square.sum())
        ulps += float(noise.sum()) * 12 / max(len(low), 1)
        row_noise = max(row_noise, float(torch.minimum(noise.sum(1), square.sum(1)).max()))
        column_squares += square.sum(0)
        column_noise += noise.sum(0)
    independent = ulps * len(low) / 12
    sigma = _largest(held) if sigma is None else sigma
    noise_sigma = math.sqrt(row_noise) + math.sqrt(float(torch.minimum(column_noise, column_squares).max()))
    return RoundingReport(
        name=name,
        step=step,
        since=since,
        delta_rms=math.sqrt(squares / (m * n)),
        delta_mean=total / (m * n),
        changed=differ / (m * n),
        noise_rms=math.sqrt(independent / (m * n)),
        delta_to_ulp=math.sqrt(squares / ulps) if ulps > 0 else math.inf,
        sigma=sigma,
        noise_sigma=noise_sigma,
        floor=math.sqrt(min(independent, squares) / (m * n)) * (m * n) ** 0.25,
        drowned=bool(low) and squares > 0 and sigma <= noise_sigma,
    )


def _largest(matrix: Tensor) -> float:
    """The largest singular value of an (m, n) matrix, or a little less, by power iteration from a fixed start."""
    v = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(ITERATIONS):
        v = matrix.T @ (matrix @ (v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)))
    return math.sqrt(float(v.norm()))


def rounding_warnings(source: CheckpointSource, sample: int = SAMPLE) -> list[str]:
    """What to know of a run whose full checkpoints are of low precision, in a few lines; empty for any other.

    Looks at ``sample`` matrices (up to ``SAMPLED_ROWS`` of each), spread over the model, between the two newest
    checkpoints; the lines say how many. Embeddings and heads are the largest and move least like the rest: they are
    looked at only where there is nothing else.
    """
    if not source.stores_full_weights or len(source.steps) < 2:
        return []
    low = [p for p in source.parameters if source.precision(p.name) in LOW]
    if not low:
        return []
    since, step = source.steps[-2:]
    inner = [p for p in low if not p.name.endswith((*HEADS, *EMBEDDINGS))]
    looked_at = _spread(inner or low, sample)
    reports = [rounding_report(source, p.name, step, since, most_rows=SAMPLED_ROWS) for p in looked_at]
    drowned = [report.name for report in reports if report.drowned]
    ratios = sorted(report.delta_to_ulp for report in reports)
    kinds = sorted({str(source.precision(p.name)).removeprefix("torch.") for p in low})
    middle = ratios[len(ratios) // 2]
    lines = [
        f"{len(low)} of {len(source.parameters)} matrices are stored in {', '.join(kinds)}; between steps {since} and "
        f"{step} they moved by {middle:.2g} of their rounding step, rms (median of {len(reports)} looked at)"
    ]
    if drowned:
        lines.append(
            f"{len(drowned)} of these {len(reports)} are drowned in rounding, such as '{drowned[0]}': save fp32 or "
            "LoRA factors, or put checkpoints further apart"
        )
    return lines


def _spread(parameters: Sequence[Parameter], count: int) -> list[Parameter]:
    """An even choice, first and last included."""
    if len(parameters) <= count:
        return list(parameters)
    return [parameters[round(i * (len(parameters) - 1) / max(count - 1, 1))] for i in range(count)]


def _blocks(shape: tuple[int, int], most_rows: int | None = None) -> Iterator[slice]:
    if most_rows is None or shape[0] <= most_rows:
        return iter(row_blocks(shape, BLOCK))
    rows = min(max(1, BLOCK // max(shape[1], 1)), PIECE, most_rows)
    pieces = most_rows // rows
    begins = (i * (shape[0] - rows) // max(pieces - 1, 1) for i in range(pieces))
    return (slice(begin, begin + rows) for begin in begins)

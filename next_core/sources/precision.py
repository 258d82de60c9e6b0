"""How much of the motion between full checkpoints stored in bf16 or fp16 is rounding.

A stored weight is its true value plus a rounding error, about uniform in +-ulp/2 and so of standard deviation
ulp / sqrt(12), where ulp is the spacing of the stored precision at that weight. A difference of two checkpoints has
both errors. They are independent where weights moved by an ulp or more. A weight that moved by less, |d| < ulp, shows
either no motion or a whole ulp, the latter with probability |d| / ulp: the mean is right, and the noise's variance is
|d| ulp - d^2, less than that of two independent errors. The observed difference is then nearly all noise, so its
square bounds the noise.

Random matrix theory tells whether the leading direction of a delta is still visible. An m x n matrix of independent
entries of standard deviation s has a largest singular value of about s (sqrt m + sqrt n), and a rank-one motion of size
sigma leaves a trace in its leading singular vectors only if sigma > s (m n)^(1/4) (Baik, Ben Arous and Peche 2005;
Benaych-Georges and Nadakuditi, arXiv 1103.2221, section 3.1). Where s differs between entries, as here, the roots of
the largest summed variance of a row and of a column replace s sqrt n and s sqrt m (Bandeira and van Handel, arXiv
1408.6185). A leading direction whose singular value is no larger than that bound may be rounding alone: it is called
drowned.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.errors import not_found
from next_core.interfaces import CheckpointSource
from next_core.mathematics.row_blocks import row_blocks
from next_core.sources.matrices import EMBEDDINGS, HEADS

LOW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 2**22  # Elements of a matrix that are processed together (32 MiB in fp64)
ITERATIONS = 16
"""Steps of the power iteration if no singular value is given; its error is towards smaller ones, so towards drowned."""
SAMPLE = 12  # Matrices of a source that are examined for its warnings
SAMPLED_ROWS = 4096  # Limit of the rows examined in each of them
PIECE = 256  # Consecutive rows in such a sample


@dataclass(frozen=True)
class RoundingReport:
    """One matrix between two checkpoints: its motion as stored, and how much of it may be rounding.

    - ``delta_rms``: root mean square of the stored difference, which rounding inflates.
    - ``noise_rms``: rms of two independent rounding errors (0 if both ends are fp32).
    - ``delta_to_ulp``: ``delta_rms`` over the rms of the ulps, infinite without any.
    - ``sigma``, ``noise_sigma``: the largest singular value of the stored difference, and the largest that rounding
      alone may have; ``drowned`` if the former is no larger.
    - ``floor``: the smallest rank-one motion that leaves a trace under the rounding.
    """

    name: str
    step: int
    since: int | None
    delta_rms: float
    noise_rms: float
    delta_to_ulp: float
    sigma: float
    noise_sigma: float
    floor: float
    drowned: bool


def ulp(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of a floating-point precision at each weight, in fp64; weights must have that precision."""
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
    """Report on the rounding in one parameter's delta between two steps (``since=None``: where RL began).

    ``sigma`` is the largest singular value of that delta as stored, if it is known; else it is computed, with the delta
    in memory in fp32. Otherwise memory is bounded by ``BLOCK``. With ``most_rows`` the report is about a sample of so
    many rows at most, as if they were the matrix; fewer rows show a motion less well. Raises ``CheckpointError`` for an
    unknown parameter and for a source without full weights.
    """
    shape = next((p.shape for p in source.parameters if p.name == name), None)
    if shape is None:
        raise not_found(f"the run has no parameter '{name}'")
    low = [(model, dtype) for model in map(source.model, (step, since)) if (dtype := model.dtype(name)) in LOW]
    blocks = list(_blocks(shape, most_rows))
    m, n = sum(rows.stop - rows.start for rows in blocks), shape[1]
    size = m * n
    squares = ulps = row_noise = 0.0
    column_squares, column_noise = torch.zeros(n).double(), torch.zeros(n).double()
    held, filled = torch.empty((m if sigma is None else 0, n)), 0
    for rows in blocks:
        delta = source.delta_rows(name, rows, step, since).double()
        if sigma is None:
            held[filled : filled + len(delta)] = delta
            filled += len(delta)
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
        delta_rms=math.sqrt(squares / size),
        noise_rms=math.sqrt(independent / size),
        delta_to_ulp=math.sqrt(squares / ulps) if ulps > 0 else math.inf,
        sigma=sigma,
        noise_sigma=noise_sigma,
        floor=math.sqrt(min(independent, squares) / size) * size**0.25,
        drowned=bool(low) and squares > 0 and sigma <= noise_sigma,
    )


def _largest(matrix: Tensor) -> float:
    """Return the largest singular value of a matrix (m, n), or a little less, by power iteration from a fixed start."""
    v = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(ITERATIONS):
        v = matrix.T @ (matrix @ (v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)))
    return math.sqrt(float(v.norm()))


def rounding_warnings(source: CheckpointSource, sample: int = SAMPLE) -> list[str]:
    """Return a few lines about a run whose full checkpoints have low precision; none for any other run.

    ``sample`` matrices (up to ``SAMPLED_ROWS`` rows each), spread over the model, are compared between the two newest
    checkpoints. Embeddings and heads, the largest and least typical ones, count only if there is nothing else.
    """
    if not source.stores_full_weights or len(source.steps) < 2:
        return []
    low = [p for p in source.parameters if source.precision(p.name) in LOW]
    if not low:
        return []
    since, step = source.steps[-2:]
    inner = [p for p in low if not p.name.endswith((*HEADS, *EMBEDDINGS))]
    among = inner or low
    chosen = [among[round(i)] for i in torch.linspace(0, len(among) - 1, min(sample, len(among))).tolist()]
    reports = [rounding_report(source, p.name, step, since, most_rows=SAMPLED_ROWS) for p in chosen]
    drowned = [report.name for report in reports if report.drowned]
    ratios = sorted(report.delta_to_ulp for report in reports)
    precisions = sorted({str(source.precision(p.name)).removeprefix("torch.") for p in low})
    median = ratios[len(ratios) // 2]
    lines = [
        f"{len(low)} of {len(source.parameters)} matrices are stored in {', '.join(precisions)}; between steps {since} "
        f"and {step} they moved by {median:.2g} of their rounding step, rms (median of {len(reports)} matrices)"
    ]
    if drowned:
        lines.append(
            f"{len(drowned)} of these {len(reports)} are drowned in rounding, such as '{drowned[0]}': save fp32 or "
            "LoRA factors, or space checkpoints further apart"
        )
    return lines


def _blocks(shape: tuple[int, int], most_rows: int | None = None) -> Iterator[slice]:
    """Yield all rows in blocks, or pieces of consecutive rows spread over the matrix, ``most_rows`` in all."""
    if most_rows is None or shape[0] <= most_rows:
        return iter(row_blocks(shape, BLOCK))
    rows = min(max(1, BLOCK // max(shape[1], 1)), PIECE, most_rows)
    pieces = most_rows // rows
    starts = (i * (shape[0] - rows) // max(pieces - 1, 1) for i in range(pieces))
    return (slice(start, start + rows) for start in starts)

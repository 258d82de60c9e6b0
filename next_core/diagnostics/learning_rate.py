"""How many times too small a run's learning rate is, from the agreement of its consecutive updates."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from next_core.diagnostics.figures import Null, number
from next_core.diagnostics.gram_figures import step_lengths
from next_core.diagnostics.random_walks import band, chunks, isotropic_walks, median, quantile
from next_core.diagnostics.trajectory import measured_steps, spread_out
from next_core.errors import CheckpointError
from next_core.history.history import History, motion_grams
from next_core.interfaces import CheckpointSource
from next_core.mathematics.agreement import agreement, comparable_span

BALANCED = 0.1
"""lambda up to which a constant learning rate is large enough: about that of the best one on the arithmetic task."""
STRAIGHT = 0.98  # lambda beyond which it no longer says how small a learning rate is
EXPONENT = 0.63  # On the arithmetic task (lambda / (1 - lambda)) to this power falls as the learning rate grows
MOST_MOMENTS = 32  # At most so many moments at which successive motions are compared
COVERS = 2.7
"""The best rate of a sweep was within this factor of the estimate for all 33 plain runs of three tasks at 3e-5 to 3e-4
in benchmarks/results/rates.json, whether the runs of the sweep end in a mean or not."""
SHORT = 200  # Runs of fewer steps read high: early in a run motions agree more
WORTH_TELLING = 2.0  # A smaller factor cannot be told from a rate that is right


@dataclass(frozen=True)
class LearningRate:
    """How many times too small a run's learning rate looks: about ``factor``, between ``low`` and ``high``; 1 is fine.

    It follows from ``agreement``: lambda of successive motions of ``span`` RL steps, the median over matrices, and of
    that the median over ``moments`` in time (``quartiles`` over time). Where ``adaptive-secant`` jumped, its median
    ``multiple`` is in the factor. ``jumps``: how many were made, by any predictor. ``reason``: why there is no figure.
    ``logged`` holds the smallest and the largest rate that the trainer logged, where it did, and ``steps`` the length
    of the run.
    """

    agreement: float | None = None
    quartiles: tuple[float, float] | None = None
    null: Null | None = None
    factor: float | None = None
    low: float | None = None
    high: float | None = None
    span: int | None = None
    moments: int = 0
    multiple: float | None = None
    jumps: int = 0
    reason: str | None = None
    logged: tuple[float, float] | None = None
    steps: int = 0


@dataclass(frozen=True)
class Agreements:
    """lambda of successive motions (of A and B under LoRA) of ``span`` RL steps, (M, L), and of walks, (D, M, L)."""

    span: int
    moments: tuple[int, ...]
    values: Tensor
    draws: Tensor


def measure_agreements(history: History, draws: int, seed: int) -> Agreements | str:
    """Return the agreement of successive motions, half a span apart or more, and its null; or why there is none."""
    if not history.names:
        return "no matrix moved over the last interval: did training change the weights?"
    steps = measured_steps(history)
    known = sorted({*steps, history.source.origin} if _start_is_known(history) else steps)
    span = comparable_span(known, steps)
    if span is None:
        listed = ", ".join(map(str, known[:8])) + (", ..." if len(known) > 8 else "")
        return f"no two successive motions of one length between {len(known)} points: {listed}"
    ends: list[int] = []
    for step in reversed(steps):
        if {step - span, step - 2 * span} <= set(known) and (not ends or 2 * (ends[-1] - step) >= span):
            ends.append(step)
    moments = spread_out(ends[::-1], MOST_MOMENTS)
    points = sorted({moment - back * span for moment in moments for back in (0, 1, 2)})
    at = {point: index for index, point in enumerate(points)}

    def agreements(grams: Tensor) -> Tensor:
        each = []
        for moment in moments:
            first, middle, last = (at[moment - back * span] for back in (2, 1, 0))
            each.append(agreement(grams, slice(first, middle), slice(middle, last)))
        return torch.stack(each, -1)

    found = motion_grams(history, points)
    grams = torch.stack([found[name] for name in history.names])
    shapes = [(history.shapes[name], history.ranks[name]) for name in history.names]
    entries = torch.tensor([math.prod(shape) if rank is None else rank * sum(shape) for shape, rank in shapes])
    lengths, rng = step_lengths(grams), np.random.default_rng(seed)
    drawn = [agreements(isotropic_walks(lengths, entries, count, rng)) for _, count in chunks(draws, lengths)]
    return Agreements(span, moments, agreements(grams), torch.cat(drawn))


def _start_is_known(history: History) -> bool:
    """Whether steps can be compared with where RL began: for LoRA, only where the adapter's own step 0 was kept."""
    lora = next((name for name in history.names if history.ranks[name] is not None), None)
    try:
        return lora is None or history.source.factors(lora, history.source.origin) is not None
    except CheckpointError:
        return False


def learning_rate_factor(
    history: History, jumps: Sequence[Mapping[str, Any]] = (), *, draws: int = 100, seed: int = 0
) -> LearningRate:
    """Estimate how many times too small the learning rate of a run is, from its checkpoints and jumps.

    ``jumps`` are records of the run's journal; ``draws`` random walks show what agreement arises by chance. Open a
    full-parameter run whose backbone may be missing by ``with_origin``. Raises ``CheckpointError`` for what cannot be
    read.
    """
    return judge(history, measure_agreements(history, draws, seed), jumps)


def run_advice(source: CheckpointSource, jumps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return one sentence when a run's learning rate was too small; None when it was not, or for full parameters."""
    if any(parameter.rank is None for parameter in source.parameters):  # reading whole matrices would take long
        return None
    return learning_rate_advice(learning_rate_factor(History(source), jumps))


def learning_rate_advice(rate: LearningRate) -> str | None:
    """Return how many times too small the learning rate looks, and why; None where it does not."""
    if rate.factor is None or rate.factor < WORTH_TELLING or rate.low is None or rate.high is None:
        return None
    assert rate.agreement is not None
    why = f"consecutive {rate.span}-step updates have agreement {number(rate.agreement)}"
    if rate.multiple is not None:
        why = f"adaptive-secant multiplied its steps by {rate.multiple:.1f} (median), and {why}"
    elif rate.jumps:
        why += ", jumps excluded"
    low, high = rate.low / COVERS, rate.high * COVERS
    most = f"{high:.2g}" if high < 100 else f"{high:.0f}"
    # A quartile that is capped bounds nothing, and neither does what is made of it.
    capped = rate.quartiles is not None and rate.quartiles[1] >= STRAIGHT
    between = f"{low:.2g} or more" if capped else f"{low:.2g} to {most}"
    times = f"{'at least ' if rate.agreement >= STRAIGHT else 'about '}{rate.factor:.2g} times too small ({between})"
    return f"{_action(rate)} It looks {times}: {why}{null_in_words(rate.null)}.{_doubts(rate)}"


def _action(rate: LearningRate) -> str:
    """Return what to do about it, with the rate to use where the trainer logged its own."""
    assert rate.factor is not None
    if rate.logged is None:
        return "Raise the learning rate."
    return f"Raise learning_rate from {rate.logged[1]:.2g} to about {rate.logged[1] * rate.factor:.1g}, in steps."


def _doubts(rate: LearningRate) -> str:
    doubts = []
    if rate.steps < SHORT:
        doubts.append(f"a run of {rate.steps} steps reads high")
    if rate.moments == 1:
        doubts.append("only one comparison was possible")
    if rate.logged is not None and rate.logged[0] < 0.8 * rate.logged[1]:
        doubts.append("the rate changed during the run")
    return f" Note: {'; '.join(doubts)}." if doubts else ""


def null_in_words(null: Null | None) -> str:
    """Return the null in parentheses, to follow a figure."""
    return "" if null is None else f" (random walk {number(null.mean)}, 95% {number(null.low)} to {number(null.high)})"


def judge(history: History, agreements: Agreements | str, jumps: Sequence[Mapping[str, Any]]) -> LearningRate:
    """Return the learning rate that agreements imply, next to the one that the trainer logged."""
    metrics = history.source.logged_metrics().values()
    logged = [numbers["learning_rate"] for numbers in metrics if numbers.get("learning_rate")]
    ends = (min(logged), max(logged)) if logged else None
    return dataclasses.replace(_factor(agreements, jumps), logged=ends, steps=history.newest - history.source.origin)


def _factor(agreements: Agreements | str, jumps: Sequence[Mapping[str, Any]]) -> LearningRate:
    """Turn lambda, where it is above a random walk's, into a factor, times what ``adaptive-secant`` multiplied.

    Jumps are not in lambda, but RL ran with them: it is the lambda of the rate that they made RL act with.
    """
    made, multiple = sum(bool(jump["accepted"]) for jump in jumps), _multiple(jumps)
    if isinstance(agreements, str):
        return LearningRate(multiple=multiple, jumps=made, reason=agreements)
    over_time = median(agreements.values, 0)
    if bool(over_time.isnan().all()):
        return LearningRate(multiple=multiple, jumps=made, reason="no matrix moved between the moments compared")
    low, middle, high = (float(quantile(over_time, q)) for q in (0.25, 0.5, 0.75))
    null = Null(*(float(one) for one in band(median(median(agreements.draws, 1)))))
    base = 1.0 if multiple is None else multiple
    factor, least, most = (base * (_too_small(x) if middle > null.high else 1.0) for x in (middle, low, high))
    span, moments = agreements.span, len(agreements.moments)
    return LearningRate(middle, (low, high), null, factor, least, most, span, moments, multiple, made)


def _too_small(value: float) -> float:
    """Return lambda / (1 - lambda) relative to its value at ``BALANCED``, to the power of ``EXPONENT``; at least 1."""
    at = min(max(value, BALANCED), STRAIGHT)
    return math.pow(at / (1 - at) * (1 - BALANCED) / BALANCED, EXPONENT)


def _multiple(jumps: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median of the multiples that ``adaptive-secant`` tried, 1 where one was refused; None without it."""
    each = [
        float(jump["diagnostics"]["multiple"]) if jump["accepted"] else 1.0
        for jump in jumps
        if (jump.get("diagnostics") or {}).get("multiple") is not None
    ]
    return statistics.median(each) if each else None

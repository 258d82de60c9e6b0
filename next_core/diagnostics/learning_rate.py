"""Whether a run's learning rate is too small, and how many times: from the agreement of its successive motions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from next_core.diagnostics.advice import learning_rate_advice
from next_core.diagnostics.analysis_results import LearningRate, Null
from next_core.diagnostics.figures import Agreements, measure_agreements, median, quantile
from next_core.diagnostics.nulls import band
from next_core.history.history import History
from next_core.interfaces import CheckpointSource

BALANCED = 0.1
"""lambda up to which a constant learning rate is large enough: about that of the best one on the arithmetic task."""
STRAIGHT = 0.98
"""lambda beyond which it no longer says how small a learning rate is."""
EXPONENT = 0.63
"""On the arithmetic task (lambda / (1 - lambda)) to this power falls as the learning rate grows."""


def learning_rate_factor(
    history: History, jumps: Sequence[Mapping[str, Any]] = (), *, draws: int = 100, seed: int = 0
) -> LearningRate:
    """How many times too small the learning rate of a run looks, from its checkpoints and the jumps tried in it.

    ``jumps`` are records of the run's journal; ``draws`` random walks say what agreement is by chance. A full-parameter
    run whose backbone may be missing is opened by ``with_origin``. Raises ``CheckpointError`` for what cannot be read.
    """
    return judge(measure_agreements(history, draws, seed), jumps)


def run_advice(source: CheckpointSource, jumps: Sequence[Mapping[str, Any]]) -> str | None:
    """Return one sentence when a run's learning rate was too small; None when it was not, or for full parameters.

    Reading whole matrices at the end of a full-parameter run would take long.
    """
    if any(parameter.rank is None for parameter in source.parameters):
        return None
    return learning_rate_advice(learning_rate_factor(History(source), jumps))


def judge(agreements: Agreements | str, jumps: Sequence[Mapping[str, Any]]) -> LearningRate:
    """From lambda, as far as it is above a random walk's, and from the multiple that ``auto`` added to the rate.

    With jumps in play lambda is that of RL at the rate they make it act with: what they did comes on top.
    """
    made, multiple = sum(bool(jump["accepted"]) for jump in jumps), _multiple(jumps)
    if isinstance(agreements, str):
        return LearningRate(multiple=multiple, jumps=made, reason=agreements)
    over_time = median(agreements.values[:-1], 0)
    if bool(over_time.isnan().all()):
        return LearningRate(multiple=multiple, jumps=made, reason="no matrix moved between the moments compared")
    low, middle, high = (float(quantile(over_time, q)) for q in (0.25, 0.5, 0.75))
    null = Null(*(float(one) for one in band(median(median(agreements.draws[:, :-1], 1)))))
    base = 1.0 if multiple is None else multiple

    def factor(value: float) -> float:
        return base * (_too_small(value) if middle > null.high else 1.0)

    return LearningRate(
        agreement=middle,
        quartiles=(low, high),
        null=null,
        factor=factor(middle),
        low=factor(low),
        high=factor(high),
        span=agreements.span,
        moments=len(agreements.moments),
        multiple=multiple,
        jumps=made,
    )


def _too_small(value: float) -> float:
    """lambda / (1 - lambda) over what it is at ``BALANCED``, to the power of ``EXPONENT``; 1 at least."""
    at = min(max(value, BALANCED), STRAIGHT)
    return math.pow(at / (1 - at) * (1 - BALANCED) / BALANCED, EXPONENT)


def _multiple(jumps: Sequence[Mapping[str, Any]]) -> float | None:
    """The median of the multiples ``auto`` tried, 1 where one was refused; None of a run without it."""
    each = [
        float(jump["diagnostics"]["multiple"]) if jump["accepted"] else 1.0
        for jump in jumps
        if (jump.get("diagnostics") or {}).get("multiple") is not None
    ]
    return statistics.median(each) if each else None

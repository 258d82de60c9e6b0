"""Inner products of a run's successive motions: of the adapter's factors where there are any, else of the deltas."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor

from next_core.errors import CheckpointError
from next_core.history.history import History
from next_core.mathematics.agreement import factor_motion_gram
from next_core.types import LoraFactors


def motion_grams(history: History, points: Sequence[int]) -> Mapping[str, Tensor]:
    """Return per moving matrix the inner products of the motions between N + 1 successive points, fp64, (N, N).

    The motions are those of A and B where the run has factors: a jump in factor space moves these too, so motion and
    jump are measured alike. Otherwise they are deltas. A point 0 that is not a checkpoint is where RL began. The
    factors of each point are read once.
    """
    spans = [history.span(step, since) for since, step in itertools.pairwise(points)]
    found = {}
    for name in history.names:
        factors = _factors(history, name, points)
        found[name] = history.inner_products(spans)[name] if factors is None else factor_motion_gram(factors)
    return found


def _factors(history: History, name: str, points: Sequence[int]) -> list[LoraFactors] | None:
    try:
        found = [history.source.factors(name, point) for point in points]
    except CheckpointError:  # step 0 was not kept
        return None
    return None if None in found else [factors for factors in found if factors is not None]

"""How far motion goes on as it was: two successive motions of a run compared, from its checkpoints alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.history import History
from next_core.interfaces import LoraFactors

SPAN = 20
"""RL steps of each of the two motions, where nothing else is asked for: ten would still show Adam's own momentum."""


def comparable_span(points: Collection[int], ends: Sequence[int], most: int = SPAN) -> int | None:
    """The longest span up to ``most``, or the shortest beyond it, of two successive motions between ``points``.

    The later of the two ends at one of ``ends``. None where there are no two of one length.
    """
    known = set(points)
    there = sorted({end - point for end in ends for point in known if point < end and 2 * point - end in known})
    return next((span for span in reversed(there) if span <= most), there[0] if there else None)


def motion_grams(history: History, points: Sequence[int]) -> Mapping[str, Tensor]:
    """Per moving matrix the inner products of the motions from each point to the next, fp64, (N, N) of N + 1 points.

    In the adapter's own factors, which a jump moves alike, where they are there; else of the deltas. A first point
    that is no checkpoint is where RL began. The factors of each point are read once.
    """
    starts = [points[0] if points[0] in history.steps else None, *points[1:]]
    spans = [(now, then) for now, then in zip(points[1:], starts, strict=False)]
    found = {}
    for name in history.names:
        factors = _factors(history, name, points)
        found[name] = history.inner_products(spans)[name] if factors is None else _of_factors(factors)
    return found


def agreement(grams: Tensor, before: slice, after: slice) -> Tensor:
    """lambda = <P, D> / <P, P>, P and D the sums of some motions whose inner products are (..., N, N): (...).

    1 where motion goes straight on, 0 where it forgets its direction; NaN where nothing moved in P.
    """
    square = grams[..., before, before].sum((-2, -1))
    return torch.where(square > 0, grams[..., before, after].sum((-2, -1)) / square, torch.nan)


def _of_factors(factors: Sequence[LoraFactors]) -> Tensor:
    gram = torch.zeros(len(factors) - 1, len(factors) - 1, dtype=torch.float64)
    for side in zip(*((at.A, at.B) for at in factors), strict=True):
        moved = torch.stack([factor.double().flatten() for factor in side]).diff(dim=0)
        gram += moved @ moved.T
    return gram


def _factors(history: History, name: str, points: Sequence[int]) -> list[LoraFactors] | None:
    try:
        found = [history.source.factors(name, point) for point in points]
    except CheckpointError:  # step 0 was not kept
        return None
    return None if None in found else [factors for factors in found if factors is not None]

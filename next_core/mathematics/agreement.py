"""Whether motion continues in the same direction: two successive motions of a run, compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from next_core.types import LoraFactors

SPAN = 20
"""RL steps of each of the two motions, where nothing else is asked for: ten would still show Adam's own momentum."""


def comparable_span(points: Collection[int], ends: Sequence[int], most: int = SPAN) -> int | None:
    """The longest span up to ``most``, or the shortest beyond it, of two successive motions between ``points``.

    The later of the two ends at one of ``ends``. None where there are no two of one length.
    """
    known = set(points)
    there = sorted({end - point for end in ends for point in known if point < end and 2 * point - end in known})
    return next((span for span in reversed(there) if span <= most), there[0] if there else None)


def agreement(grams: Tensor, before: slice, after: slice) -> Tensor:
    """lambda = <P, D> / <P, P>, P and D the sums of some motions whose inner products are (..., N, N): (...).

    1 where motion goes straight on, 0 where it forgets its direction; NaN where nothing moved in P.
    """
    square = grams[..., before, before].sum((-2, -1))
    return torch.where(square > 0, grams[..., before, after].sum((-2, -1)) / square, torch.nan)


def factor_motion_gram(factors: Sequence[LoraFactors]) -> Tensor:
    gram = torch.zeros(len(factors) - 1, len(factors) - 1, dtype=torch.float64)
    for side in zip(*((at.A, at.B) for at in factors), strict=True):
        moved = torch.stack([factor.double().flatten() for factor in side]).diff(dim=0)
        gram += moved @ moved.T
    return gram

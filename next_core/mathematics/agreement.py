"""Agreement: how far one motion of a run continues the motion before it."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from next_core.types import LoraFactors

SPAN = 20
"""Default length of each motion in RL steps. Over ten steps, Adam's own momentum would still make motions agree."""


def comparable_span(points: Collection[int], ends: Sequence[int], most: int = SPAN) -> int | None:
    """Return the longest span up to ``most``, or else the shortest, of two successive motions between ``points``.

    The later motion ends at one of ``ends``. None where no two successive motions have equal length.
    """
    known = set(points)
    spans = sorted({end - point for end in ends for point in known if point < end and 2 * point - end in known})
    return next((span for span in reversed(spans) if span <= most), spans[0] if spans else None)


def agreement(grams: Tensor, before: slice, after: slice) -> Tensor:
    """Return lambda = <P, D> / <P, P>, (...), of motions whose inner products are ``grams`` (..., N, N).

    P and D are the sums of the motions ``before`` and ``after``. 1 where motion continues in a straight line, 0 where
    it forgets its direction, NaN where P is zero.
    """
    square = grams[..., before, before].sum((-2, -1))
    return torch.where(square > 0, grams[..., before, after].sum((-2, -1)) / square, torch.nan)


def factor_motion_gram(factors: Sequence[LoraFactors]) -> Tensor:
    """Return the inner products of successive motions of A and B, (N, N), fp64, of N + 1 adapters in order.

    A and B count as one long vector, so the result does not depend on the scaling.
    """
    gram = torch.zeros(len(factors) - 1, len(factors) - 1, dtype=torch.float64)
    for side in zip(*((at.A, at.B) for at in factors), strict=True):
        moved = torch.stack([factor.double().flatten() for factor in side]).diff(dim=0)
        gram += moved @ moved.T
    return gram

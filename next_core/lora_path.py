"""One LoRA matrix over time: the singular triplets of many of its deltas, from inner products they share.

The delta between checkpoints t and s is D = s (B_t A_t - B_s A_s) = s [B_t - B_s, B_s] [A_t; A_t - A_s]. All that a
decomposition of D needs of the long sides m and n are r x r blocks such as B_t^T B_s, and these are shared: fifteen
checkpoints with global, local and target deltas take 39 blocks a side, where each delta alone would take four.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from next_core.errors import NextCoreError
from next_core.gram_svd import LowRankGrams, Solved, triplets_from_grams
from next_core.interfaces import LoraFactors, Span
from next_core.lowrank import (
    Factors,
    LowRank,
    concatenate_batches,
    lora_difference,
    truncated_svd,
)

_Part = tuple[int, int | None, Tensor]
"""A row of the result, a step, and coefficients (r, k) on that step's factor."""
_CANCELLATION = 1e-9
"""Relative error of |D|^2 that differences of blocks may have; a delta so short is decomposed from its own factors."""
_EPS = torch.finfo(torch.float64).eps


class LoraPath:
    """A (r, n) and B (m, r) of one matrix at several steps; ``start`` is the adapter RL began with, if it adds any.

    Raises ``NextCoreError`` for factors of unlike shapes, and for NaN or Inf in them when they are used.
    """

    def __init__(self, factors: Mapping[int, LoraFactors], start: LoraFactors | None = None) -> None:
        stored: dict[int | None, LoraFactors] = dict(factors.items())
        if start is not None:
            stored[None] = start
        first = next(iter(stored.values()), None)
        if first is None:
            raise NextCoreError("a path needs the factors of at least one step")
        for step, at in stored.items():
            if at.A.shape != first.A.shape or at.B.shape != first.B.shape:
                raise NextCoreError(
                    f"factors of unlike shapes: A {tuple(at.A.shape)}, B {tuple(at.B.shape)} at step {step}, "
                    f"A {tuple(first.A.shape)}, B {tuple(first.B.shape)} before"
                )
        self.rank = first.A.shape[0]
        self.shape = first.B.shape[0], first.A.shape[1]
        self._rows = {step: slice(i * self.rank, (i + 1) * self.rank) for i, step in enumerate(stored)}
        width = self.rank * len(stored)
        self._left = torch.empty(self.shape[0], width, dtype=torch.float64)
        self._right = torch.empty(width, self.shape[1], dtype=torch.float64)
        for step, at in stored.items():
            torch.mul(at.B.detach(), at.scaling, out=self._left[:, self._rows[step]])
            self._right[self._rows[step]].copy_(at.A.detach())
        self._blocks: dict[tuple[int | None, int | None], tuple[Tensor, Tensor]] = {}

    def delta(self, step: int, since: int | None = None) -> LowRank:
        """W_step - W_since, of rank r or 2r."""
        if since not in self._rows:
            return LowRank(self._left[:, self._rows[step]], self._right[self._rows[step]])
        later, earlier = ((self._right[self._rows[t]], self._left[:, self._rows[t]]) for t in (step, since))
        return lora_difference(later, earlier, 1.0)

    def gram(self, spans: Sequence[Span]) -> Tensor:
        """The inner products of the deltas of several spans, (len(spans), len(spans)), fp64.

        From the scaled factors' own inner products; spans too short for that are subtracted first.
        """
        steps = sorted({t for span in spans for t in span if t in self._rows}, key=lambda t: -1 if t is None else t)
        products = torch.zeros(len(steps), len(steps), dtype=torch.float64)
        for i, t in enumerate(steps):
            for j, s in enumerate(steps[i:], i):
                left, right = self._block(t, s)
                products[i, j] = products[j, i] = (left * right).sum()
        where = {step: i for i, step in enumerate(steps)}
        contrasts = torch.zeros(len(spans), len(steps), dtype=torch.float64)
        for row, (step, since) in enumerate(spans):
            contrasts[row, where[step]] += 1
            if since in self._rows:
                contrasts[row, where[since]] -= 1
        gram = contrasts @ products @ contrasts.T
        noise = _EPS * (contrasts.abs() @ products.diagonal().sqrt()).square()
        short = (noise > _CANCELLATION * gram.diagonal()).nonzero().flatten().tolist()
        return self._short_gram(gram, spans, short)

    def _short_gram(self, gram: Tensor, spans: Sequence[Span], short: list[int]) -> Tensor:
        """Replace the rows and columns of short spans, whose inner products have cancelled."""
        deltas = [self.delta(*span) for span in spans] if short else []
        for i in short:
            for j, other in enumerate(deltas):
                own = deltas[i]
                left, right = own.left.T @ other.left, own.right @ other.right.T
                gram[i, j] = gram[j, i] = (left * right).sum()
        return gram

    def triplets(self, spans: Sequence[Span], k: int, spectrum: bool = False) -> Factors:
        """The leading k singular triplets of each span's delta: ``Factors`` with leading dimension len(spans).

        ``nuclear`` is known with ``spectrum`` or k > 1, which take a full decomposition of each small core. Accurate
        to about 1e-9 relative, and better for deltas that are not short beside the weights they lie between.
        """
        one_sided = [i for i, (_, since) in enumerate(spans) if since not in self._rows]
        two_sided = [i for i, (_, since) in enumerate(spans) if since in self._rows]
        made: dict[int, Factors] = {}
        left: list[_Part] = []
        right: list[_Part] = []
        k = min(k, *self.shape)
        for rows in filter(None, (one_sided, two_sided)):
            solved = _widened(triplets_from_grams(self._grams([spans[i] for i in rows]), k, spectrum), k)
            for i, row in enumerate(rows):
                nuclear = None if solved.nuclear is None else solved.nuclear[i : i + 1]
                if solved.sound[i]:
                    here, (x, y) = slice(i, i + 1), (solved.left[i], solved.right[i])
                    empty = x.new_zeros(1, 0, k)
                    made[row] = Factors(empty, solved.S[here], empty, solved.energy[here], nuclear)
                    left += self._parts(row, spans[row], x, side="left")
                    right += self._parts(row, spans[row], y, side="right")
                else:
                    exact = truncated_svd(self.delta(*spans[row]), k).batch()
                    made[row] = exact if solved.nuclear is not None else dataclasses.replace(exact, nuclear=None)
        U = self._combine(left, len(spans), k, self._left.T)
        V = self._combine(right, len(spans), k, self._right)
        for row, found in made.items():
            if not found.U.shape[-2]:
                u, v = (_unit_rows(x[row], found.S[0] > 0).mT[None] for x in (U, V))
                made[row] = dataclasses.replace(found, U=u, V=v)
        return concatenate_batches([made[i] for i in range(len(spans))])

    def _parts(self, row: int, span: Span, x: Tensor, side: Literal["left", "right"]) -> list[_Part]:
        """Coefficients (r or 2r, k) on [B_t - B_s, B_s] or [A_t; A_t - A_s]^T, as those on each checkpoint's factor."""
        (step, since), r = span, self.rank
        if since not in self._rows:
            return [(row, step, x)]
        first, second = x[:r], x[r:]
        if side == "left":
            return [(row, step, first), (row, since, second - first)]
        return [(row, step, first + second), (row, since, -second)]

    def _grams(self, spans: list[Span]) -> LowRankGrams:
        """Of [B_t - B_s, B_s] and of [A_t; A_t - A_s] for each span, or of B_t and A_t alone."""
        pairs = []
        for step, since in spans:
            left_tt, right_tt = self._block(step, step)
            size = left_tt.trace() * right_tt.trace()
            if since not in self._rows:
                pairs.append((left_tt, right_tt, size))
                continue
            left_ts, right_ts = self._block(step, since)
            left_ss, right_ss = self._block(since, since)
            pairs.append(
                (
                    _square(left_tt - left_ts - left_ts.T + left_ss, left_ts - left_ss, left_ss),
                    _square(right_tt, right_tt - right_ts, right_tt - right_ts - right_ts.T + right_ss),
                    size + left_ss.trace() * right_ss.trace(),
                )
            )
        left, right, size = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return LowRankGrams(left, right, noise=size * (_EPS / _CANCELLATION))

    def _block(self, t: int | None, s: int | None) -> tuple[Tensor, Tensor]:
        """B_t^T B_s and A_t A_s^T."""
        if (t, s) not in self._blocks:
            if (s, t) in self._blocks:
                left, right = self._blocks[s, t]
                return left.T, right.T
            rows_t, rows_s = self._rows[t], self._rows[s]
            left = self._left[:, rows_t].T @ self._left[:, rows_s]
            right = self._right[rows_t] @ self._right[rows_s].T
            if t == s and not math.isfinite(float(left.sum() + right.sum())):
                raise NextCoreError(
                    f"NaN, Inf or squares beyond float64 in the factors of step {t}; is the checkpoint damaged, or "
                    "did the run diverge?"
                )
            self._blocks[t, s] = left, right
        return self._blocks[t, s]

    def _combine(self, parts: list[_Part], count: int, k: int, factors: Tensor) -> Tensor:
        """(count, k, d): per row the sum of coefficients^T @ factor (r, d) of a step; each step is read once."""
        out = torch.zeros(count * k, factors.shape[1], dtype=torch.float64)
        for step, at in self._rows.items():
            mine = [(row, x) for row, its, x in parts if its == step]
            if mine:
                where = torch.tensor([row * k + j for row, _ in mine for j in range(k)])
                out.index_add_(0, where, torch.cat([x for _, x in mine], 1).T @ factors[at])
        return out.reshape(count, k, -1)


def _square(upper: Tensor, corner: Tensor, lower: Tensor) -> Tensor:
    return torch.cat([torch.cat([upper, corner], 1), torch.cat([corner.T, lower], 1)])


def _widened(solved: Solved, k: int) -> Solved:
    """The same with zero components up to k, which may be more than the factors have columns."""
    missing = k - solved.S.shape[-1]
    if missing <= 0:
        return solved
    left, S, right = (torch.nn.functional.pad(x, (0, missing)) for x in (solved.left, solved.S, solved.right))
    return dataclasses.replace(solved, left=left, S=S, right=right)


def _unit_rows(x: Tensor, alive: Tensor) -> Tensor:
    """x (k, d) with rows of unit norm where ``alive`` (k,), and zero elsewhere."""
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(alive[:, None], unit, 0.0)

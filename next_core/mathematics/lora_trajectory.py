"""One LoRA matrix over time: the singular triplets of many of its deltas, from inner products they share.

The delta between checkpoints t and s is D = s (B_t A_t - B_s A_s) = s [B_t - B_s, B_s] [A_t; A_t - A_s]. All that a
decomposition of D needs of the long sides m and n are r x r blocks such as B_t^T B_s, and these are shared: fifteen
checkpoints with global, local and target deltas take 39 blocks a side, where each delta alone would take four.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from next_core.errors import NextCoreError
from next_core.mathematics import low_rank as lowrank
from next_core.mathematics.gram_svd import LowRankGrams, Solved, triplets_from_grams
from next_core.mathematics.low_rank import (
    Factors,
    LowRank,
    concatenate_batches,
    lora_difference,
    truncated_svd,
)
from next_core.types import LoraFactors, Span

_Part = tuple[int, int | None, Tensor]
"""A row of the result, a step, and coefficients (r, k) on that step's factor."""
_CANCELLATION = 1e-9
"""Relative error of |D|^2 that differences of blocks may have; a delta so short is decomposed from its own factors."""
_EPS = torch.finfo(torch.float64).eps


class Workspace:
    """Memory that one path after the other is laid out in: new pages cost more than the numbers put into them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return type(self), ()  # each process has its own

    def take(self, what: str, rows: int, columns: int) -> Tensor:
        """(rows, columns), fp64, of any values; what was taken before under this name is overwritten."""
        size = rows * columns
        if what not in self._buffers or self._buffers[what].numel() < size:
            self._buffers[what] = torch.empty(size, dtype=torch.float64)
        return self._buffers[what][:size].view(rows, columns)


class LoraTrajectory:
    """A (r, n) and B (m, r) of one matrix at several steps; ``start`` is the adapter RL began with, if it adds any.

    With a ``workspace``, the path is gone once another is made there.
    Raises ``NextCoreError`` for factors of unlike shapes, and for NaN or Inf in them when they are used.
    """

    def __init__(
        self,
        factors: Mapping[int, LoraFactors],
        start: LoraFactors | None = None,
        workspace: Workspace | None = None,
    ) -> None:
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
        space = Workspace() if workspace is None else workspace
        self._left, self._right = space.take("B", self.shape[0], width), space.take("A", width, self.shape[1])
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
        steps = [step for step in self._rows if any(step in span for span in spans)]
        products = torch.zeros(len(steps), len(steps), dtype=torch.float64)
        sizes = torch.zeros(len(steps), dtype=torch.float64)  # |B|^2 |A|^2, which is what rounding is relative to
        places = [list(self._rows).index(step) for step in steps]
        for i, t in enumerate(steps):
            # Every step with all later ones at once: a wide product is twice as fast as many narrow ones.
            columns = slice(self._rows[t].start, None)
            left = self._left[:, self._rows[t]].T @ self._left[:, columns]
            right = self._right[self._rows[t]] @ self._right[columns].T
            sizes[i] = left[:, : self.rank].trace() * right[:, : self.rank].trace()
            sums = (left * right).sum(0).reshape(-1, self.rank).sum(1)
            found = sums[[place - places[i] for place in places[i:]]]
            products[i, i:], products[i:, i] = found, found
        if not math.isfinite(float(products.sum())):
            raise self._not_finite(
                next(s for s, value in zip(steps, products.diagonal(), strict=True) if not value.isfinite())
            )
        where = {step: i for i, step in enumerate(steps)}
        contrasts = torch.zeros(len(spans), len(steps), dtype=torch.float64)
        for row, (step, since) in enumerate(spans):
            contrasts[row, where[step]] += 1
            if since in self._rows:
                contrasts[row, where[since]] -= 1
        gram = contrasts @ products @ contrasts.T
        noise = _EPS * (contrasts.abs() @ sizes.sqrt()).square()
        short = (noise > _CANCELLATION * gram.diagonal()).nonzero().flatten().tolist()
        return self._short_gram(gram, spans, short)

    def _short_gram(self, gram: Tensor, spans: Sequence[Span], short: list[int]) -> Tensor:
        """Replace the rows and columns of short spans, whose inner products have cancelled."""
        # By their own singular triplets: their factors may cancel again, in the products.
        width = min(2 * self.rank, *self.shape)
        exact = {i: truncated_svd(self.delta(*spans[i]), width).lowrank() for i in short}
        for i in short:
            for j, span in enumerate(spans):
                other = exact[j] if j in exact else self.delta(*span)
                gram[i, j] = gram[j, i] = lowrank.inner(exact[i], other)
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
        self._prepare(spans)
        pairs = []
        for step, since in spans:
            left_tt, right_tt = self._block(step, step)
            size = left_tt.trace() * right_tt.trace()
            if since not in self._rows:
                pairs.append((left_tt, right_tt, size, torch.ones_like(size)))
                continue
            left_ts, right_ts = self._block(step, since)
            left_ss, right_ss = self._block(since, since)
            moved_l = left_tt - left_ts - left_ts.T + left_ss
            moved_r = right_tt - right_ts - right_ts.T + right_ss
            pairs.append(
                (
                    _square(moved_l, left_ts - left_ss, left_ss),
                    _square(right_tt, right_tt - right_ts, moved_r),
                    size + left_ss.trace() * right_ss.trace(),
                    torch.maximum(_blur(left_tt, left_ss, moved_l), _blur(right_tt, right_ss, moved_r)),
                )
            )
        left, right, size, blur = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return LowRankGrams(left, right, noise=size * (_EPS / _CANCELLATION), blur=blur)

    def _prepare(self, spans: list[Span]) -> None:
        """The blocks that some spans need, of each step with all that lie side by side in one product."""
        steps = list(self._rows)
        place = {step: index for index, step in enumerate(steps)}
        partners: dict[int | None, set[int]] = {}
        for span in spans:
            known = [step for step in span if step in place]
            for step in known:
                partners.setdefault(step, set()).add(place[step])
            if len(known) == 2:
                partners[known[0]].add(place[known[1]])
        for step, others in partners.items():
            todo = sorted(other for other in others if (step, steps[other]) not in self._blocks)
            for run in _runs(todo):
                columns = slice(run[0] * self.rank, (run[-1] + 1) * self.rank)
                left = self._left[:, self._rows[step]].T @ self._left[:, columns]
                right = self._right[self._rows[step]] @ self._right[columns].T
                parts = zip(run, torch.split(left, self.rank, 1), torch.split(right, self.rank, 1), strict=True)
                self._blocks |= {(step, steps[other]): (a, b) for other, a, b in parts}
        self._refuse_non_finite(partners)

    def _refuse_non_finite(self, steps: Iterable[int | None]) -> None:
        for step in steps:
            left, right = self._blocks[step, step]
            if not math.isfinite(float(left.sum() + right.sum())):
                raise self._not_finite(step)

    @staticmethod
    def _not_finite(step: int | None) -> NextCoreError:
        return NextCoreError(
            f"NaN, Inf or squares beyond float64 in the factors of {'the start' if step is None else f'step {step}'}; "
            "is the checkpoint damaged, or did the run diverge?"
        )

    def _block(self, t: int | None, s: int | None) -> tuple[Tensor, Tensor]:
        """B_t^T B_s and A_t A_s^T."""
        if (t, s) in self._blocks:
            return self._blocks[t, s]
        left, right = self._blocks[s, t]
        return left.T, right.T

    def _combine(self, parts: list[_Part], count: int, k: int, factors: Tensor) -> Tensor:
        """(count, k, d): per row the sum of coefficients^T @ factor (r, d) of a step; each step is read once."""
        out = torch.zeros(count * k, factors.shape[1], dtype=torch.float64)
        for step, at in self._rows.items():
            mine = [(row, x) for row, its, x in parts if its == step]
            if mine:
                where = torch.tensor([row * k + j for row, _ in mine for j in range(k)])
                out.index_add_(0, where, torch.cat([x for _, x in mine], 1).T @ factors[at])
        return out.reshape(count, k, -1)


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Ascending numbers, cut where one is missing."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _blur(later: Tensor, earlier: Tensor, moved: Tensor) -> Tensor:
    """How much larger the numbers were whose difference a column's squared length is; infinite where none is left."""
    return ((later.diagonal() + earlier.diagonal()) / moved.diagonal().clamp_min(0)).amax()


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

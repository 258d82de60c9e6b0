"""One LoRA matrix over time: the singular triplets of many of its deltas, from inner products that they share.

The delta between checkpoints t and s is D = c (B_t A_t - B_s A_s) = c [B_t - B_s, B_s] [A_t; A_t - A_s] with the
scaling c. The long sides m and n enter a decomposition of D only through r x r blocks such as B_t^T B_s. Deltas share
these: fifteen checkpoints with global, local and target deltas need 39 blocks a side, where each delta alone would
need four.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from next_core.errors import NextCoreError, wrong_shape
from next_core.mathematics.gram_svd import LowRankGrams, Triplets, triplets_from_grams
from next_core.mathematics.low_rank import (
    Factors,
    LowRank,
    concatenate_batches,
    inner,
    lora_difference,
    truncated_svd,
    unit_columns,
)
from next_core.mathematics.row_blocks import keep_freed_memory
from next_core.types import LoraFactors, Span

_Term = tuple[int, int | None, Tensor]  # A row of the result, a step, and coefficients (r, k) on that step's factor
_TOLERANCE = 1e-9
"""Relative error allowed in |D|^2 from differences of blocks; shorter deltas are decomposed from their own factors."""
_EPS = torch.finfo(torch.float64).eps


class Workspace:
    """Memory reused for one trajectory after another: page faults of new memory cost more than filling it."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._buffers: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return type(self), ()  # each process has its own

    def take(self, what: str, rows: int, columns: int) -> Tensor:
        """Return an uninitialised fp64 tensor (rows, columns); it overwrites the last one taken under this name."""
        size = rows * columns
        if what not in self._buffers or self._buffers[what].numel() < size:
            self._buffers[what] = torch.empty(size, dtype=torch.float64)
        return self._buffers[what][:size].view(rows, columns)


class LoraTrajectory:
    """A (r, n) and B (m, r) of one matrix at several steps; ``start`` is the adapter RL began with, if it adds any.

    With a ``workspace``, making another trajectory there overwrites this one. Raises ``NextCoreError`` for factors of
    different shapes, and on use for NaN or Inf.
    """

    def __init__(
        self, factors: Mapping[int, LoraFactors], start: LoraFactors | None = None, workspace: Workspace | None = None
    ) -> None:
        stored: dict[int | None, LoraFactors] = dict(factors.items())
        if start is not None:
            stored[None] = start
        first = next(iter(stored.values()), None)
        if first is None:
            raise wrong_shape("a trajectory needs the factors of at least one step")
        for step, at in stored.items():
            if at.A.shape != first.A.shape or at.B.shape != first.B.shape:
                raise wrong_shape(
                    f"LoRA factors differ in shape: A {tuple(at.A.shape)}, B {tuple(at.B.shape)} at step {step}, "
                    f"A {tuple(first.A.shape)}, B {tuple(first.B.shape)} before"
                )
        self.rank = first.A.shape[0]
        self.shape = first.B.shape[0], first.A.shape[1]
        # All factors side by side, B as columns of one matrix and A as rows of another: blocks of several steps come
        # from one wide product, which is about twice as fast as many narrow ones.
        self._slices = {step: slice(i * self.rank, (i + 1) * self.rank) for i, step in enumerate(stored)}
        width = self.rank * len(stored)
        space = Workspace() if workspace is None else workspace
        self._left, self._right = space.take("B", self.shape[0], width), space.take("A", width, self.shape[1])
        for step, at in stored.items():
            torch.mul(at.B.detach(), at.scaling, out=self._left[:, self._slices[step]])
            self._right[self._slices[step]].copy_(at.A.detach())
        self._blocks: dict[tuple[int | None, int | None], tuple[Tensor, Tensor]] = {}

    def delta(self, step: int, since: int | None = None) -> LowRank:
        """Return W_step - W_since, of rank r or 2r."""
        if since not in self._slices:
            return LowRank(self._left[:, self._slices[step]], self._right[self._slices[step]])
        later, earlier = ((self._right[self._slices[t]], self._left[:, self._slices[t]]) for t in (step, since))
        return lora_difference(later, earlier, 1.0)

    def gram(self, spans: Sequence[Span]) -> Tensor:
        """Return the inner products of the deltas of several spans, (len(spans), len(spans)), fp64.

        All follow from the inner products <c B_t A_t, c B_s A_s>: a delta is a difference of two such matrices. Where
        a delta is so short that this difference loses its digits, its factors are subtracted first.
        """
        steps = [step for step in self._slices if any(step in span for span in spans)]
        products = torch.zeros(len(steps), len(steps), dtype=torch.float64)
        sizes = torch.zeros(len(steps), dtype=torch.float64)  # |B|^2 |A|^2: rounding is relative to the terms summed
        places = [list(self._slices).index(step) for step in steps]
        for i, t in enumerate(steps):
            columns = slice(self._slices[t].start, None)  # this step and all later ones
            left = self._left[:, self._slices[t]].T @ self._left[:, columns]
            right = self._right[self._slices[t]] @ self._right[columns].T
            sizes[i] = left[:, : self.rank].trace() * right[:, : self.rank].trace()
            # <B_t A_t, B_s A_s> = tr((B_t^T B_s)(A_s A_t^T)): an elementwise product, summed over each r x r block.
            sums = (left * right).sum(0).reshape(-1, self.rank).sum(1)
            found = sums[[place - places[i] for place in places[i:]]]
            products[i, i:], products[i:, i] = found, found
        for step, value in zip(steps, products.diagonal(), strict=True):
            _refuse_non_finite(step, value)
        where = {step: i for i, step in enumerate(steps)}
        contrasts = torch.zeros(len(spans), len(steps), dtype=torch.float64)  # +1 at step, -1 at since
        for row, (step, since) in enumerate(spans):
            contrasts[row, where[step]] += 1
            if since in self._slices:
                contrasts[row, where[since]] -= 1
        gram = contrasts @ products @ contrasts.T
        # |D|^2 adds and subtracts products as large as (|B_t| |A_t| + |B_s| |A_s|)^2; rounding is relative to these.
        noise = _EPS * (contrasts.abs() @ sizes.sqrt()).square()
        short = (noise > _TOLERANCE * gram.diagonal()).nonzero().flatten().tolist()
        # Short deltas as their own singular triplets: the products of their factors may cancel once more.
        width = min(2 * self.rank, *self.shape)
        exact = {i: truncated_svd(self.delta(*spans[i]), width).lowrank() for i in short}
        for i in short:
            for j, span in enumerate(spans):
                gram[i, j] = gram[j, i] = inner(exact[i], exact[j] if j in exact else self.delta(*span))
        return gram

    def triplets(self, spans: Sequence[Span], k: int, spectrum: bool = False) -> Factors:
        """Return the leading k singular triplets of each span's delta: ``Factors`` with leading dimension len(spans).

        ``nuclear`` is known with ``spectrum`` or k > 1, which need a full decomposition of each small core. Accurate to
        about 1e-9 (relative), and better for deltas that are not much shorter than the weights they lie between.
        """
        k = min(k, *self.shape)
        made: dict[int, Factors] = {}
        left: list[_Term] = []
        right: list[_Term] = []
        for two_sided in (False, True):  # one batch for each width of the factors, r and 2r
            rows = [row for row, (_, since) in enumerate(spans) if (since in self._slices) == two_sided]
            if not rows:
                continue
            found = _padded(triplets_from_grams(self._grams([spans[row] for row in rows]), k, spectrum), k)
            for i, row in enumerate(rows):
                if found.sound[i]:
                    here, (step, since), x, y = slice(i, i + 1), spans[row], found.x[i], found.y[i]
                    empty = x.new_zeros(1, 0, k)  # U and V follow below, for all rows at once
                    nuclear = None if found.nuclear is None else found.nuclear[here]
                    made[row] = Factors(empty, found.S[here], empty, found.energy[here], nuclear)
                    if two_sided:
                        # [B_t - B_s, B_s] x = B_t x_1 + B_s (x_2 - x_1); [A_t; A_t - A_s]^T y likewise.
                        (x_1, x_2), (y_1, y_2) = torch.split(x, self.rank), torch.split(y, self.rank)
                        left += [(row, step, x_1), (row, since, x_2 - x_1)]
                        right += [(row, step, y_1 + y_2), (row, since, -y_2)]
                    else:
                        left.append((row, step, x))
                        right.append((row, step, y))
                else:
                    exact = truncated_svd(self.delta(*spans[row]), k).batch()
                    made[row] = exact if found.nuclear is not None else dataclasses.replace(exact, nuclear=None)
        U = self._combine(left, len(spans), k, self._left.T)
        V = self._combine(right, len(spans), k, self._right)
        for row, factors in made.items():
            if not factors.U.shape[-2]:
                u, v = (unit_columns(x[row].mT[None], factors.S) for x in (U, V))
                made[row] = dataclasses.replace(factors, U=u, V=v)
        return concatenate_batches([made[i] for i in range(len(spans))])

    def _grams(self, spans: list[Span]) -> LowRankGrams:
        """Return the Gram matrices of [B_t - B_s, B_s] and [A_t; A_t - A_s] for each span, or of B_t and A_t alone.

        (B_t - B_s)^T (B_t - B_s) is expanded into blocks that other spans use too. The expansion subtracts: between
        neighbouring checkpoints B_t ~ B_s, and |B_t|^2 + |B_s|^2 - 2 <B_t, B_s> keeps only the digits by which
        they differ. ``cancellation`` and ``noise_floor`` say how many are left; a span with too few is decomposed from
        factors that were subtracted before any product.
        """
        self._compute_blocks(spans)
        grams = []
        for step, since in spans:
            left_tt, right_tt = self._block(step, step)
            size = left_tt.trace() * right_tt.trace()
            if since not in self._slices:
                grams.append((left_tt, right_tt, size, torch.ones_like(size)))
                continue
            left_ts, right_ts = self._block(step, since)
            left_ss, right_ss = self._block(since, since)
            # With L = [B_t - B_s, B_s], L^T L has the corner (B_t - B_s)^T B_s = B_t^T B_s - B_s^T B_s; A likewise.
            moved_l = left_tt - left_ts - left_ts.T + left_ss
            moved_r = right_tt - right_ts - right_ts.T + right_ss
            grams.append(
                (
                    _symmetric(moved_l, left_ts - left_ss, left_ss),
                    _symmetric(right_tt, right_tt - right_ts, moved_r),
                    size + left_ss.trace() * right_ss.trace(),
                    torch.maximum(_cancellation(left_tt, left_ss, moved_l), _cancellation(right_tt, right_ss, moved_r)),
                )
            )
        # Rounding leaves an error of about eps * size in |D|^2, which above this floor is less than _TOLERANCE |D|^2.
        left, right, size, cancellation = (torch.stack(parts) for parts in zip(*grams, strict=True))
        return LowRankGrams(left, right, noise_floor=size * (_EPS / _TOLERANCE), cancellation=cancellation)

    def _compute_blocks(self, spans: list[Span]) -> None:
        """Compute the blocks that some spans need: per step, one product for each group of neighbouring partners."""
        steps = list(self._slices)
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
            for group in _consecutive(todo):
                columns = slice(group[0] * self.rank, (group[-1] + 1) * self.rank)
                left = self._left[:, self._slices[step]].T @ self._left[:, columns]
                right = self._right[self._slices[step]] @ self._right[columns].T
                parts = zip(group, torch.split(left, self.rank, 1), torch.split(right, self.rank, 1), strict=True)
                self._blocks |= {(step, steps[other]): (a, b) for other, a, b in parts}
        for step in partners:
            left, right = self._blocks[step, step]
            _refuse_non_finite(step, left.sum() + right.sum())

    def _block(self, t: int | None, s: int | None) -> tuple[Tensor, Tensor]:
        """Return B_t^T B_s and A_t A_s^T, (r, r) each."""
        if (t, s) in self._blocks:
            return self._blocks[t, s]
        left, right = self._blocks[s, t]
        return left.T, right.T

    def _combine(self, terms: list[_Term], count: int, k: int, factors: Tensor) -> Tensor:
        """Return (count, k, d): per row the sum of coefficients^T @ factor (r, d). Each step's factor is read once."""
        out = torch.zeros(count * k, factors.shape[1], dtype=torch.float64)
        for step, at in self._slices.items():
            own = [(row, x) for row, its_step, x in terms if its_step == step]
            if own:
                where = torch.tensor([row * k + j for row, _ in own for j in range(k)])
                out.index_add_(0, where, torch.cat([x for _, x in own], 1).T @ factors[at])
        return out.reshape(count, k, -1)


def _refuse_non_finite(step: int | None, value: Tensor) -> None:
    """Raise ``NextCoreError`` unless a sum over one step's factors is finite."""
    if not math.isfinite(float(value)):
        raise NextCoreError(
            f"NaN, Inf or squares beyond float64 in the factors of {'the start' if step is None else f'step {step}'}; "
            "is the checkpoint damaged, or did the run diverge?",
            kind="numbers-not-finite",
        )


def _consecutive(places: Sequence[int]) -> list[list[int]]:
    """Split ascending numbers into groups of consecutive ones, in which number and index differ by a constant."""
    groups = itertools.groupby(enumerate(places), key=lambda item: item[1] - item[0])
    return [[place for _, place in group] for _, group in groups]


def _cancellation(later: Tensor, earlier: Tensor, moved: Tensor) -> Tensor:
    """Return how much larger than a column's squared length the subtracted numbers were; infinite where none is left.

    The relative rounding error of the difference is eps times this.
    """
    return ((later.diagonal() + earlier.diagonal()) / moved.diagonal().clamp_min(0)).amax()


def _symmetric(upper: Tensor, corner: Tensor, lower: Tensor) -> Tensor:
    """Return [[upper, corner], [corner^T, lower]]."""
    return torch.cat([torch.cat([upper, corner], 1), torch.cat([corner.T, lower], 1)])


def _padded(found: Triplets, k: int) -> Triplets:
    """Add zero components up to k, which may be more than the factors have columns."""
    missing = k - found.S.shape[-1]
    if missing <= 0:
        return found
    x, S, y = (torch.nn.functional.pad(part, (0, missing)) for part in (found.x, found.S, found.y))
    return dataclasses.replace(found, x=x, S=S, y=y)

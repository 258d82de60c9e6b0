"""Inner products of a run's motion and of predictions, from what one pass over each matrix leaves.

A LoRA delta, and a prediction in factor space, is a sum of products s sum_ab c_ab B_a A_b over the parts of the factors
(``next_core.sources.replay``). All inner products of such sums need only the r x r blocks B_a^T B_b and A_a A_b^T,
which are the same for every cut, predictor and choice of signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.diagnostics.backtest_inputs import BacktestInputs
from next_core.errors import CheckpointError
from next_core.history.matrix_tasks import BLOCK_BYTES, InnerProducts
from next_core.mathematics import low_rank as lowrank
from next_core.mathematics.low_rank import LowRank
from next_core.mathematics.row_blocks import row_blocks
from next_core.sources.replay import Parts, read_parts

Pieces = tuple[Tensor, Tensor]
"""X and Y, (p, size): the matrix s sum_p (sum_a X_pa B_a)(sum_b Y_pb A_b)."""


@dataclass(frozen=True, eq=False)
class Grams:
    """Inner products of one matrix's motion, for the run (draw 0) and its walks, fp64.

    ``moved``: whether it moved up to each observed step since the one before. ``whole`` (draws + 1, N, N) are those of
    all increments; where jumps make the deltas differ from cut to cut, ``each`` has what ``at`` gives. ``kept``:
    whether the LoRA factors that RL began with can be read.
    """

    setting: BacktestInputs
    moved: tuple[bool, ...]
    whole: Tensor | None = None
    each: tuple[Tensor, ...] = ()
    kept: bool = False

    def at(self, draw: int, cut: int) -> Tensor:
        """Of the n increments up to a cut and of the motion from it to the horizon: (n + 1, n + 1)."""
        if self.whole is None:
            return self.each[self.setting.cuts.index(cut)][draw]
        contrasts = self.setting.contrasts(cut)
        return contrasts @ self.whole[draw] @ contrasts.T


@dataclass(frozen=True)
class MeasureMotion:
    """Task: the ``Grams`` of one matrix. Raises ``CheckpointError`` for what is not finite."""

    setting: BacktestInputs

    def __call__(self, name: str) -> Grams:
        setting = self.setting
        parts = read_parts(setting.source, name, setting.moments, setting.jumps)
        found = self._dense(name) if parts is None else self._lora(name, parts)
        if not all(bool(gram.isfinite().all()) for gram in (found.whole, *found.each) if gram is not None):
            raise CheckpointError(f"'{name}' holds NaN, Inf or numbers whose squares are; is a checkpoint damaged?")
        return found

    def _dense(self, name: str) -> Grams:
        setting = self.setting
        steps, newest = setting.steps, setting.steps[-1]
        gram = InnerProducts(setting.source, tuple(setting.increments(newest)))(name)
        each = [gram]
        for draw in range(1, setting.draws + 1):
            signs = _of_steps(setting, draw, name)
            each.append(gram * signs * signs[:, None])
        return Grams(setting, tuple(bool(gram[i, i] > 0) for i in range(len(steps))), torch.stack(each))

    def _lora(self, name: str, parts: Parts) -> Grams:
        setting, course = self.setting, self.setting.course
        blocks = Blocks.of(parts)
        turns = [course.signs(setting.signs(draw), name) for draw in range(setting.draws + 1)]
        first = 1 if 0 in setting.steps else 0
        moved = [False] * first + [blocks.nonzero(1 + i) for i in range(len(setting.moments))]
        if not setting.jumps:
            spans = increment_pieces(setting, parts, setting.steps[-1])
            return Grams(
                setting, tuple(moved), torch.stack([blocks.gram(spans, turn) for turn in turns]), (), parts.kept
            )
        each = []
        for cut in setting.cuts:
            spans = [*increment_pieces(setting, parts, cut), motion_pieces(setting, cut)]
            each.append(torch.stack([blocks.gram(spans, turn) for turn in turns]))
        return Grams(setting, tuple(moved), None, tuple(each), parts.kept)


def _of_steps(setting: BacktestInputs, draw: int, name: str) -> Tensor:
    """The sign of each observed step's increment, (N,)."""
    signs = setting.signs(draw)
    found = torch.ones(len(setting.steps), dtype=torch.float64)
    if signs is not None:
        found[len(setting.steps) - len(setting.moments) :] = signs.of(name)
    return found


def increment_pieces(setting: BacktestInputs, parts: Parts, until: int) -> list[Pieces]:
    """The increments up to a step, as they looked when it was reached."""
    course = setting.course
    found = []
    for step, since in setting.increments(until):
        now = course.at(step, until)
        if since is not None:
            found.append(difference(now, course.at(since, until)))
        elif step > 0 and parts.kept and (parts.starts or any(made < until for made in course.jumps)):
            found.append(difference(now, course.at(0, until)))
        else:
            found.append((now[None], now[None]))
    return found


def motion_pieces(setting: BacktestInputs, cut: int) -> Pieces:
    """W_{t+h} - W_t, as it looked when t + h was reached: what RL did, and not the jumps in between."""
    course, end = setting.course, cut + setting.horizon
    return difference(course.at(end, end), course.at(cut, end))


def difference(later: Tensor, earlier: Tensor) -> Pieces:
    """B_t A_t - B_s A_s = (B_t - B_s) A_t + B_s (A_t - A_s): small numbers are subtracted before any product."""
    return torch.stack([later - earlier, earlier]), torch.stack([later, later - earlier])


@dataclass(frozen=True, eq=False)
class Blocks:
    """B_a^T B_b and A_a A_b^T of all parts, (size, size, r r) each, fp64, and the scaling s."""

    left: Tensor
    right: Tensor
    scaling: float

    @classmethod
    def of(cls, parts: Parts) -> Blocks:
        return cls(_products(parts.B.mT), _products(parts.A), parts.scaling)

    def nonzero(self, part: int) -> bool:
        """Whether a part is anything but zero."""
        return bool(self.left[part, part].any() or self.right[part, part].any())

    def gram(self, matrices: Sequence[Pieces], signs: Tensor) -> Tensor:
        """The inner products of matrices given by their pieces, with these signs of the parts, (K, K).

        <X_p Y_p, X_q Y_q> = sum of the elementwise product of X_p^T X_q and Y_p Y_q^T, both r x r.
        """
        owner = torch.repeat_interleave(torch.arange(len(matrices)), torch.tensor([len(x) for x, _ in matrices]))
        member = torch.nn.functional.one_hot(owner, len(matrices)).double()
        X, Y = (torch.cat(each) * signs for each in zip(*matrices, strict=True))
        size, square = self.left.shape[1:]
        found = torch.empty(len(X), len(X), dtype=torch.float64)
        chunk = max(1, BLOCK_BYTES // (8 * square * max(size, len(X))))
        for begin in range(0, len(X), chunk):
            rows = slice(begin, begin + chunk)
            left = X @ (X[rows] @ self.left.flatten(1)).view(-1, size, square)
            right = Y @ (Y[rows] @ self.right.flatten(1)).view(-1, size, square)
            found[rows] = (left * right).sum(-1)
        sums = self.scaling**2 * member.T @ found @ member
        return (sums + sums.T) / 2


def _products(parts: Tensor) -> Tensor:
    """P_a P_b^T of all pairs of parts (size, r, d): (size, size, r r)."""
    size, rank, length = parts.shape
    flat = parts.reshape(size * rank, length)
    found = torch.empty(size, size, rank, rank, dtype=torch.float64)
    for a in range(size):
        row = (parts[a] @ flat[a * rank :].T).view(rank, size - a, rank).transpose(0, 1)
        found[a, a:], found[a:, a] = row, row.mT
    return found.flatten(2)


@dataclass(frozen=True, eq=False)
class Asked:
    """A prediction's motion P of one matrix: ``matrix`` + sum_i along[i] x_i, x_i the increments up to the cut.

    Or ``pieces``, where it is of products of the factors' parts.
    """

    draw: int
    cut: int
    along: Tensor
    matrix: LowRank | None = None
    pieces: Pieces | None = None


@dataclass(frozen=True)
class MeasurePredictions:
    """Task: <P, P> and <P, D> of some predictions of one matrix, D the motion that followed; (K, 2), fp64."""

    setting: BacktestInputs
    grams: dict[str, Grams]
    asked: dict[str, list[Asked]]

    def __call__(self, name: str) -> Tensor:
        asked, setting = self.asked[name], self.setting
        found = torch.zeros(len(asked), 2, dtype=torch.float64)
        for i, one in enumerate(asked):
            gram, along = self.grams[name].at(one.draw, one.cut), torch.nn.functional.pad(one.along, (0, 1))
            found[i, 0], found[i, 1] = along @ gram @ along, along @ gram[-1]
        whole = [(i, one, one.matrix) for i, one in enumerate(asked) if one.matrix is not None]
        if not whole and all(one.pieces is None for one in asked):
            return found  # nothing has to be read again
        parts = read_parts(setting.source, name, setting.moments, setting.jumps)
        if parts is not None:
            self._in_factor_space(name, parts, found)
        matrices = [(one, matrix) for _, one, matrix in whole]
        if matrices:
            products = self._dense(name, matrices) if parts is None else self._lora(name, parts, matrices)
            for (i, one, matrix), along_and_ahead in zip(whole, products, strict=True):
                found[i, 0] += lowrank.inner(matrix, matrix) + 2 * one.along @ along_and_ahead[:-1]
                found[i, 1] += along_and_ahead[-1]
        return found

    def _in_factor_space(self, name: str, parts: Parts, found: Tensor) -> None:
        """Predictions made of pieces, a draw and cut at a time."""
        groups: dict[tuple[int, int], list[tuple[int, Pieces]]] = {}
        for i, one in enumerate(self.asked[name]):
            if one.pieces is not None:
                groups.setdefault((one.draw, one.cut), []).append((i, one.pieces))
        if not groups:
            return
        blocks = Blocks.of(parts)
        for (draw, cut), some in groups.items():
            signs = self.setting.course.signs(self.setting.signs(draw), name)
            gram = blocks.gram([*(pieces for _, pieces in some), motion_pieces(self.setting, cut)], signs)
            for row, (i, _) in enumerate(some):
                found[i, 0], found[i, 1] = gram[row, row], gram[row, -1]

    def _lora(self, name: str, parts: Parts, whole: Sequence[tuple[Asked, LowRank]]) -> list[Tensor]:
        """<M, x_i> and <M, D>, (n + 1,), of each matrix M = L R: tr(L^T B_a A_b R^T) from thin products."""
        setting, found, begin = self.setting, [], 0
        lefts = torch.cat([matrix.left.double() for _, matrix in whole], 1).mT @ parts.B  # (size, K, r)
        rights = torch.cat([matrix.right.double() for _, matrix in whole]) @ parts.A.mT  # (size, K, r)
        for one, matrix in whole:
            mine = slice(begin, begin := begin + matrix.rank)
            along = increment_pieces(setting, parts, one.cut) if bool(one.along.any()) else []
            signs = setting.course.signs(setting.signs(one.draw), name)
            values = [
                (torch.tensordot(X * signs, lefts[:, mine], 1) * torch.tensordot(Y * signs, rights[:, mine], 1)).sum()
                for X, Y in (*along, motion_pieces(setting, one.cut))
            ]
            products = parts.scaling * torch.stack(values)
            found.append(torch.nn.functional.pad(products, (len(one.along) + 1 - len(products), 0)))
        return found

    def _dense(self, name: str, whole: Sequence[tuple[Asked, LowRank]]) -> list[Tensor]:
        """The same, the increments read once, in blocks of rows."""
        setting, spans = self.setting, self.setting.increments(self.setting.steps[-1])
        left = torch.cat([matrix.left.double() for _, matrix in whole], 1)  # (m, K)
        right = torch.cat([matrix.right.double() for _, matrix in whole]).mT.contiguous()  # (n, K)
        table = torch.zeros(left.shape[1], len(spans), dtype=torch.float64)
        shape = len(left), len(right)
        for rows in row_blocks(shape, BLOCK_BYTES // 8):
            for column, span in enumerate(spans):
                moved = setting.source.delta_rows(name, rows, *span).double()
                table[:, column] += ((moved @ right) * left[rows]).sum(0)
        owner = torch.repeat_interleave(torch.arange(len(whole)), torch.tensor([matrix.rank for _, matrix in whole]))
        sums = torch.zeros(len(whole), len(spans), dtype=torch.float64).index_add_(0, owner, table)
        return [
            setting.contrasts(one.cut) @ (sums[row] * _of_steps(setting, one.draw, name))
            for row, (one, _) in enumerate(whole)
        ]

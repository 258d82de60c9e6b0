"""One cut of a backtest: the history a predictor is fitted to, and what its prediction moves each matrix by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from next_core.diagnostics.backtest_geometry import Asked, Grams, Pieces
from next_core.diagnostics.backtest_inputs import BacktestInputs
from next_core.errors import CheckpointError, GuardError, PluginError
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.interfaces.prediction import weight_delta
from next_core.interfaces.weight_delta import FactorStep
from next_core.mathematics import low_rank as lowrank
from next_core.mathematics.low_rank import Factors, LowRank
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors, Span

Shared = dict[Span, dict[str, Factors]]
"""Decomposed deltas, which are the same for every cut that has seen them."""
MATRIX = "matrix"


class CutHistory(History):
    """A run, or a walk, as it stood at a cut. Inner products come from ``Grams``, which the cuts share.

    They are of increments up to the cut, so that nothing later is in them.
    """

    def __init__(
        self, whole: History, setting: BacktestInputs, draw: int, cut: int, grams: Mapping[str, Grams], shared: Shared
    ) -> None:
        self._setting, self._draw, self._cut, self._all_grams, self._shared = setting, draw, cut, grams, shared
        super().__init__(
            setting.past(draw, cut),
            whole.rank,
            whole.compressor,
            spectrum=whole.spectrum,
            executor=whole.executor,
            cache=whole.cache,
        )

    def _unchanged(self, name: str, step: int, before: int | None) -> bool:
        return not self._all_grams[name].moved[self._setting.steps.index(step)]

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        where = {step: index for index, step in enumerate(self.steps)}
        if any(step not in where or (since is not None and since not in where) for step, since in spans):
            return super().inner_products(spans)
        chosen = tuple(spans)
        if chosen not in self._grams:
            rows = torch.zeros(len(chosen), len(self.steps), dtype=torch.float64)
            for row, (step, since) in enumerate(chosen):
                rows[row, : where[step] + 1] += 1
                if since is not None:
                    rows[row, : where[since] + 1] -= 1
            self._grams[chosen] = {
                name: rows @ self._all_grams[name].at(self._draw, self._cut)[:-1, :-1] @ rows.T for name in self.names
            }
        return self._grams[chosen]

    def _decompose(self, spans: Sequence[Span]) -> dict[str, Factors]:
        todo = [span for span in spans if not self._shared.get(span, {}).keys() >= set(self.names)]
        made = super()._decompose(todo) if todo else {}
        for row, span in enumerate(todo):
            self._shared.setdefault(span, {}).update({name: _row(factors, row) for name, factors in made.items()})
        return {name: lowrank.concatenate_batches([self._shared[span][name] for span in spans]) for name in self.names}


def _row(factors: Factors, row: int) -> Factors:
    here = slice(row, row + 1)
    nuclear = None if factors.nuclear is None else factors.nuclear[here]
    return Factors(factors.U[here], factors.S[here], factors.V[here], factors.energy[here], nuclear)


class Coordinates:
    """A cut's run in coordinates, so that the applier's own arithmetic says which combination a prediction is.

    ``along``: a dense run of (1, n) weights, the sums of the increments up to each step. ``factors``: a LoRA run of A
    (1, size) and B (size, 1), the sums of the parts of the factors.
    """

    def __init__(self, setting: BacktestInputs, cut: int, kept: bool) -> None:
        self.cut, self.steps, course = cut, setting.seen(cut), setting.course
        ones = torch.ones(len(self.steps), len(self.steps), dtype=torch.float64).tril()
        weights = {step: {MATRIX: ones[i][None]} for i, step in enumerate(self.steps)}
        self.along = MemorySource(weights, {MATRIX: torch.zeros(1, len(self.steps), dtype=torch.float64)})
        readable = [0] * (kept and 0 not in self.steps) + list(self.steps)
        each = {step: course.at(step, cut) for step in readable}
        self.factors = MemorySource({s: {MATRIX: LoraFactors(c[None], c[:, None], 1.0)} for s, c in each.items()})

    def ask(self, prediction: Prediction, name: str, draw: int, shape: tuple[int, int], lora: bool) -> Asked | None:
        """What a prediction moves one matrix by at alpha 1, in merged space; None where it stays.

        Raises ``GuardError`` for what is not finite, ``CheckpointError`` for steps that were not observed,
        ``PluginError`` for a wrong shape or what is no update.
        """
        update, weight = prediction.updates.get(name), prediction.weight(name)
        if update is None or weight == 0.0:
            return None
        matrix: LowRank | None = None
        finite = math.isfinite(weight)
        if isinstance(update, CoefficientUpdate):
            unknown = set(update.weights) - {0, *self.steps}
            if unknown:
                raise CheckpointError(f"'{name}': step {min(unknown)} was not observed; observed: {self.steps}")
            finite = finite and all(math.isfinite(value) for value in update.weights.values())
        elif isinstance(update, LowRankUpdate):
            matrix = update.matrix
            if matrix.shape != shape:
                raise PluginError(f"the update of '{name}' is {matrix.shape}, the parameter {shape}")
            finite = finite and bool(matrix.left.isfinite().all() and matrix.right.isfinite().all())
            update = LowRankUpdate(LowRank.zero(1, len(self.steps)))  # its anchor is left to be resolved
            # Copied: they may be views of components of all checkpoints, which would be kept for every cut and walk.
            matrix = LowRank(matrix.left * weight, matrix.right.clone())
        else:
            raise PluginError(f"'{name}': {type(update).__name__} is no update")
        if not finite:
            raise GuardError(f"the prediction of '{name}' is not finite")
        in_factors = lora and isinstance(update, CoefficientUpdate) and update.space == "factors"
        moved = weight_delta(
            replace(
                prediction,
                source=self.factors if in_factors else self.along,
                updates={MATRIX: update},
                confidence={MATRIX: weight},
            ),
            MATRIX,
            1.0,
        )
        still = torch.zeros(len(self.steps), dtype=torch.float64)
        if isinstance(moved, FactorStep):
            step = moved.merged()
            pieces: Pieces = step.left.mT, step.right
            return Asked(draw, self.cut, still, pieces=pieces)
        if moved is None:
            return None if matrix is None else Asked(draw, self.cut, still, matrix)
        return Asked(draw, self.cut, lowrank.dense(moved)[0], matrix)

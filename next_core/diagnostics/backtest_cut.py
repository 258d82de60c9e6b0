"""One cut of a backtest: the history that a predictor is fitted to, and how its predictions compare."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.diagnostics.backtest_inputs import BacktestInputs
from next_core.errors import CheckpointError
from next_core.history.history import History
from next_core.history.matrix_tasks import InnerProducts
from next_core.interfaces import CheckpointSource, CoefficientUpdate, Prediction
from next_core.interfaces.prediction import coefficients
from next_core.mathematics import low_rank
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank
from next_core.sources.source_views import RandomWalk, UpTo
from next_core.types import Span

Shared = dict[Span, dict[str, Factors]]
"""Decomposed deltas, which are the same at every cut that has seen them."""


@dataclass(frozen=True)
class MeasureMotion:
    """Task: the motion of one matrix by draw (0 is the run itself) and cut, fp64, (n + 1, n + 1).

    It is the Gram matrix of the n increments up to the cut and of the motion that followed, which comes last. Raises
    ``CheckpointError`` for values that are not finite.
    """

    inputs: BacktestInputs

    def __call__(self, name: str) -> dict[tuple[int, int], Tensor]:
        inputs, found = self.inputs, dict[tuple[int, int], Tensor]()
        lora = inputs.source.factors(name, inputs.cuts[0]) is not None
        for draw in range(1 + inputs.draws):
            run = inputs.run(draw)
            if lora and inputs.jumps:
                found |= {(draw, cut): self._as_of(cut, run, name) for cut in inputs.cuts}
                continue
            if lora or not isinstance(run, RandomWalk):
                gram = plain = InnerProducts(run, tuple(inputs.increments(inputs.steps[-1])))(name)
            else:  # the increments of a dense matrix are those of the run, but for their signs
                signs = run.signs(name)
                eps = torch.tensor([signs.get(step, 1.0) for step in inputs.steps], dtype=torch.float64)
                gram = plain * eps * eps[:, None]
            found |= {(draw, cut): (rows := inputs.contrasts(cut)) @ gram @ rows.T for cut in inputs.cuts}
        if not all(bool(gram.isfinite().all()) for gram in found.values()):
            raise CheckpointError(
                f"'{name}' holds NaN, Inf or numbers whose squares are; is a checkpoint damaged?",
                kind="checkpoint-not-finite",
            )
        return found

    def _as_of(self, cut: int, run: CheckpointSource, name: str) -> Tensor:
        """Measure a LoRA run with jumps: they move A and B, and so change every later B_t A_t - B_s A_s."""
        end = cut + self.inputs.horizon
        past, later, spans = run.as_of(cut), run.as_of(end), self.inputs.increments(cut)
        # The motion that followed has two points of its own, -1 and -2: later jumps moved even its start.
        points = {step: past.factors(name, step) for step, _ in spans}
        points |= {-1: later.factors(name, cut), -2: later.factors(name, end)}
        known = {step: at for step, at in points.items() if at is not None}
        return LoraTrajectory(known, past.start(name)).gram([*spans, (-2, -1)])


class CutHistory(History):
    """A run, or a walk, as it stood at a cut, and what followed, which predictors are never shown.

    ``motion`` has per matrix what ``MeasureMotion`` found; ``shared`` is filled with what the history decomposes.
    """

    def __init__(
        self, whole: History, run: CheckpointSource, cut: int, end: int, motion: Mapping[str, Tensor], shared: Shared
    ) -> None:
        self._motion, self._shared, self._cut = motion, shared, cut
        later = run.as_of(end)
        self._motion_ahead = functools.lru_cache(1)(lambda name: later.delta(name, end, cut))
        super().__init__(
            UpTo(run, cut),
            whole.rank,
            whole.compressor,
            spectrum=whole.spectrum,
            executor=whole.executor,
            cache=whole.cache,
        )

    def _unchanged(self, name: str, step: int, before: int | None) -> bool:
        return not bool(self._motion[name][-2, -2] > 0)

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        known = (None, *self.steps)
        if any(step not in known or since not in known for step, since in spans):
            return super().inner_products(spans)
        sums = torch.stack([self._path(step) - self._path(since) for step, since in spans])
        return {name: sums @ self._motion[name] @ sums.T for name in self.names}

    def _decompose(self, spans: Sequence[Span]) -> dict[str, Factors]:
        todo = [span for span in spans if not self._shared.get(span, {}).keys() >= set(self.names)]
        for name, factors in (super()._decompose(todo) if todo else {}).items():
            for row, span in enumerate(todo):
                self._shared.setdefault(span, {})[name] = factors.rows([row])
        return {name: low_rank.concatenate_batches([self._shared[span][name] for span in spans]) for name in self.names}

    def _path(self, step: int | None) -> Tensor:
        """Return W_step - W_0 as coefficients of the rows of ``motion``, (n + 1,); None is where RL began."""
        along = torch.zeros(len(self.steps) + 1, dtype=torch.float64)
        if step is not None:
            along[: self.steps.index(step) + 1] = 1
        return along

    def compare(self, prediction: Prediction, name: str) -> tuple[float, float]:
        """Return <P, P> and <P, D>: P the predicted motion of one matrix at alpha 1, D the motion that followed.

        Raises ``GuardError`` for a prediction that is not finite, ``CheckpointError`` for steps that were not observed,
        ``PluginError`` for a wrong shape.
        """
        update = prediction.updates[name]
        if isinstance(update, CoefficientUpdate) and (update.space == "merged" or self.ranks[name] is None):
            weights = coefficients(prediction, name, 1.0)
            weights.pop(0, None)  # where RL began, which W_t - W_0 counts from
            unknown = sorted(set(weights) - set(self.steps))
            if unknown:
                message = f"'{name}': step {unknown[0]} was not observed; observed: {self.steps}"
                raise CheckpointError(message, kind="predictor-wrong-answer")
            along = sum((weight * self._path(step) for step, weight in weights.items()), self._path(None))
            return float(along @ self._motion[name] @ along), float(along @ self._motion[name][-1])
        predicted, ahead = prediction.delta(name), self._motion_ahead(name)
        return _inner(predicted, predicted), _inner(predicted, ahead)


def _inner(a: LowRank | Tensor, b: LowRank | Tensor) -> float:
    """Return the Frobenius inner product; b is dense where a is."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(low_rank.inner(a, b))
    assert isinstance(b, Tensor)
    if isinstance(a, LowRank):
        return float(((a.left.double().mT @ b.double()) * a.right.double()).sum())
    return float((a.double() * b.double()).sum())

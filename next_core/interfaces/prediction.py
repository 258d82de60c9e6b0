"""Where a predictor says the weights are going, and by how much each parameter moves to get there.

This is the one place that resolves the anchor, so that a cumulative prediction is never added twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from next_core.errors import CheckpointError, GuardError, PluginError
from next_core.interfaces.checkpoint_source import CheckpointSource
from next_core.mathematics import low_rank
from next_core.mathematics.low_rank import LowRank
from next_core.mathematics.row_blocks import row_blocks
from next_core.process.optional_packages import import_optional
from next_core.types import Anchor, LoraFactors, Space

BLOCK = 2**17
"""Values in a block of rows: it stays in the processor's cache while several passes go over it."""


@dataclass(frozen=True)
class CoefficientUpdate:
    """A delta over the observed checkpoints: sum_i weights[t_i] G_{t_i}, counted from the anchor.

    In ``space="merged"`` that sum is taken of the deltas themselves. In ``space="factors"`` (LoRA only) the trained
    A and B are moved each by the same sum of their own past values; step 0 (the adapter as initialised, B = 0) takes
    what is missing to weights that sum to zero.
    """

    weights: Mapping[int, float]
    space: Space = "merged"


@dataclass(frozen=True)
class LowRankUpdate:
    """A delta given as a low-rank matrix (m, n), counted from the anchor."""

    matrix: LowRank


Update = CoefficientUpdate | LowRankUpdate


@dataclass(frozen=True, repr=False)
class Prediction:
    """Where a predictor says the weights are going.

    The updates count from ``anchor`` (the newest checkpoint, or the backbone), and only an applier resolves it: a
    cumulative prediction can never be added twice. A parameter without an update stays where it is, for the
    reason in ``abstained``; ``abstention`` says why the predictor declines to predict anything.
    """

    source: CheckpointSource
    step: int
    horizon: int
    anchor: Anchor = "newest"
    updates: Mapping[str, Update] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)
    """Per parameter a factor on alpha, finite and 0 or more; 1 where it is not given."""
    abstained: Mapping[str, str] = field(default_factory=dict)
    abstention: str | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def weight(self, name: str) -> float:
        """Return the factor on alpha of one parameter."""
        return self.confidence.get(name, 1.0)

    def delta(self, name: str, alpha: float = 1.0) -> LowRank | Tensor:
        """Return what one weight matrix (m, n) moves by from the newest checkpoint; zero where nothing is predicted.

        Raises ``GuardError`` when it is not finite, ``PluginError`` for a parameter that the run does not have.
        """
        shape = _shape(self.source, name)
        moved = weight_delta(self, name, alpha)
        return LowRank.zero(*shape) if moved is None else merged(moved)

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: per parameter its update, confidence and ||delta||_F, or why it abstained."""
        norms = jump_norms(self, 1.0)
        rows = [
            {
                "parameter": parameter.name,
                "update": type(self.updates[parameter.name]).__name__ if parameter.name in self.updates else None,
                "confidence": self.weight(parameter.name) if parameter.name in self.updates else None,
                "norm": norms.get(parameter.name, 0.0),
                "abstained": self.abstention or self.abstained.get(parameter.name),
            }
            for parameter in self.source.parameters
        ]
        return import_optional("pandas", "notebook").DataFrame(rows).set_index("parameter")

    def __repr__(self) -> str:
        what = self.abstention or f"{len(self.updates)} of {len(self.source.parameters)} matrices move"
        return f"<Prediction from step {self.step} by {self.horizon} steps: {what}>"


@dataclass(frozen=True)
class FactorStep:
    """A move of the trained adapter's own factors: A += dA, B += dB; ``at`` is where they stand."""

    dA: Tensor  # noqa: N815
    dB: Tensor  # noqa: N815
    at: LoraFactors

    def merged(self) -> LowRank:
        """scaling * ((B + dB)(A + dA) - B A): what the weight matrix moves by."""
        after = self.at.A.double() + self.dA, self.at.B.double() + self.dB
        return low_rank.lora_difference(after, (self.at.A, self.at.B), self.at.scaling)


@dataclass(frozen=True)
class Blend:
    """A move of a dense parameter that is read in blocks of rows: sum_t weights[t] (W_t - W_T) + matrix.

    ``weights`` are keyed by step, None being where RL began; they need not sum to anything, and T itself is not there.
    """

    source: CheckpointSource
    name: str
    step: int
    weights: Mapping[int | None, float]
    matrix: LowRank | None = None

    def rows(self, rows: slice) -> Tensor:
        """Some rows of it, at least fp32."""
        total: Tensor | None = None
        for since, weight in self.weights.items():
            part = self.source.delta_rows(self.name, rows, self.step, since).mul(-weight)
            total = part if total is None else total.add_(part)
        if self.matrix is not None:
            part = self.matrix.left[rows] @ self.matrix.right
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def dense(self) -> Tensor:
        """The whole (m, n) matrix in fp32, or in fp64 where that is what the source gives."""
        shape = _shape(self.source, self.name)
        whole: Tensor | None = None
        for rows in row_blocks(shape, BLOCK):
            part = self.rows(rows)
            if whole is None:
                whole = torch.empty(shape, dtype=part.dtype)
            whole[rows] = part
        return torch.zeros(shape) if whole is None else whole

    def norm(self) -> float:
        """||.||_F, block by block."""
        blocks = row_blocks(_shape(self.source, self.name), BLOCK)
        return math.sqrt(sum(float(torch.linalg.vector_norm(self.rows(rows))) ** 2 for rows in blocks))


WeightDelta = FactorStep | LowRank | Tensor
Resolved = FactorStep | LowRank | Tensor | Blend


def resolved(prediction: Prediction, name: str, alpha: float) -> Resolved | None:
    """alpha * confidence * (predicted - W_T) of one parameter; None where nothing is predicted.

    Factors are in fp64. A dense parameter of a source that reads rows alone stays a ``Blend``, of which nothing was
    read yet. Raises ``GuardError`` when it is not finite, ``PluginError`` when its shape is not the parameter's, and
    ``CheckpointError`` when its steps are not the run's.
    """
    update = prediction.updates.get(name)
    scale = alpha * prediction.weight(name)
    if update is None or scale == 0.0:
        return None
    moved: Resolved
    if isinstance(update, CoefficientUpdate):
        weights = dict(update.weights)
        if prediction.anchor == "backbone":  # from W_0 to W_T: subtract what the newest checkpoint already has
            weights[prediction.step] = weights.get(prediction.step, 0.0) - 1.0
        weights = {step: scale * weight for step, weight in weights.items() if weight != 0.0}
        if not all(math.isfinite(weight) for weight in weights.values()):  # a sum of them may hide it
            raise _not_finite(prediction, name)
        if all(step == 0 for step in weights):
            return None  # exactly where W_T is
        if _reads_rows(prediction.source, name):
            moved = _blend(prediction, name, weights)
        elif update.space == "factors" and prediction.source.factors(name, prediction.step) is not None:
            moved = _factor_step(prediction, name, weights)
        else:
            moved = _weighted_sum(prediction, name, weights)
    else:
        moved = _from_lowrank(prediction, name, update.matrix.to(torch.float64), scale)
    return _validated(prediction, name, moved)


def weight_delta(prediction: Prediction, name: str, alpha: float) -> WeightDelta | None:
    """The same with nothing left to read: a dense parameter's weight_delta is the whole matrix."""
    moved = resolved(prediction, name, alpha)
    return _validated(prediction, name, moved.dense()) if isinstance(moved, Blend) else moved


def scaled(prediction: Prediction, name: str, moved: Resolved, alpha: float) -> Resolved:
    """alpha times a weight_delta (of A and of B each, in factor space), which is the one of that alpha.

    Raises ``GuardError`` when it is not finite.
    """
    if isinstance(moved, FactorStep):
        return _validated(prediction, name, FactorStep(alpha * moved.dA, alpha * moved.dB, moved.at))
    if isinstance(moved, Blend):
        weights = {step: alpha * weight for step, weight in moved.weights.items()}
        matrix = None if moved.matrix is None else moved.matrix.scale(alpha)
        return _validated(prediction, name, replace(moved, weights=weights, matrix=matrix))
    return _validated(prediction, name, moved.scale(alpha) if isinstance(moved, LowRank) else alpha * moved)


def weight_deltas(prediction: Prediction, alpha: float) -> Iterator[tuple[str, WeightDelta]]:
    """Every parameter that moves, one at a time."""
    for name in sorted(prediction.updates):
        moved = weight_delta(prediction, name, alpha)
        if moved is not None:
            yield name, moved


def merged(moved: WeightDelta) -> LowRank | Tensor:
    """A weight_delta as it acts on the weight matrix."""
    return moved.merged() if isinstance(moved, FactorStep) else moved


def jump_norms(prediction: Prediction, alpha: float) -> dict[str, float]:
    """||weight_delta||_F of each parameter that moves, in merged space; dense ones block by block, never as a whole."""
    found: dict[str, float] = {}
    for name in sorted(prediction.updates):
        moved = resolved(prediction, name, alpha)
        if moved is None:
            continue
        delta = moved if isinstance(moved, Blend) else merged(moved)
        found[name] = float(delta.norm())
    return found


def _reads_rows(source: CheckpointSource, name: str) -> bool:
    """Whether a parameter is dense and its rows can be read alone."""
    if type(source).delta_rows is CheckpointSource.delta_rows:
        return False
    return next((parameter.kind == "dense" for parameter in source.parameters if parameter.name == name), False)


def _blend(prediction: Prediction, name: str, weights: Mapping[int, float], matrix: LowRank | None = None) -> Blend:
    """sum_t weights[t] (W_t - W_0) about W_T: the terms of W_T and W_0 cancel where the weights sum to zero."""
    rest = -sum(weights.values())
    about: dict[int | None, float] = {step: w for step, w in weights.items() if step not in (0, prediction.step)}
    unknown = set(about) - set(prediction.source.steps)
    if unknown:
        raise CheckpointError(f"step {min(map(str, unknown))} was not observed; observed: {prediction.source.steps}")
    rest += weights.get(0, 0.0)  # step 0 is where RL began
    if not abs(rest) <= 1e-12 * sum(abs(weight) for weight in weights.values()):
        about[None] = rest
    return Blend(prediction.source, name, prediction.step, about, matrix)


def _factor_step(prediction: Prediction, name: str, weights: Mapping[int, float]) -> FactorStep:
    rest = -sum(weights.values())
    if abs(rest) > 1e-12 * sum(abs(weight) for weight in weights.values()):
        weights = {**weights, 0: weights.get(0, 0.0) + rest}
    at = prediction.source.factors(name, prediction.step)
    assert at is not None
    dA, dB = torch.zeros_like(at.A, dtype=torch.float64), torch.zeros_like(at.B, dtype=torch.float64)
    for step, weight in weights.items():
        then = prediction.source.factors(name, step)
        if then is None:
            raise CheckpointError(f"step {step} has no LoRA factors of '{name}'; use space: merged")
        dA.add_(then.A, alpha=weight)
        dB.add_(then.B, alpha=weight)
    return FactorStep(dA, dB, at)


def _weighted_sum(prediction: Prediction, name: str, weights: Mapping[int, float]) -> LowRank | Tensor:
    parts = [
        (weight, prediction.source.delta(name, step)) for step, weight in weights.items() if step != 0 and weight != 0.0
    ]
    factored = [delta.scale(weight) for weight, delta in parts if isinstance(delta, LowRank)]
    if len(factored) == len(parts):
        return _no_wider_than_needed(low_rank.concatenate(factored))
    total = torch.zeros(_shape(prediction.source, name), dtype=torch.float64)
    for weight, delta in parts:
        assert isinstance(delta, Tensor)
        total.add_(delta, alpha=weight)
    return total


def _from_lowrank(prediction: Prediction, name: str, matrix: LowRank, scale: float) -> LowRank | Tensor | Blend:
    if matrix.shape != _shape(prediction.source, name):
        raise PluginError(f"the update of '{name}' is {matrix.shape}, the parameter {_shape(prediction.source, name)}")
    if prediction.anchor == "newest":
        return matrix.scale(scale)
    if _reads_rows(prediction.source, name):
        return _blend(prediction, name, {prediction.step: -scale}, matrix.scale(scale))
    moved_already = prediction.source.delta(name, prediction.step)
    if isinstance(moved_already, LowRank):
        return _no_wider_than_needed((matrix - moved_already).scale(scale))
    return scale * (matrix.dense() - moved_already)


def _no_wider_than_needed(matrix: LowRank) -> LowRank:
    """Exactly the same matrix, of rank at most min(m, n)."""
    if matrix.rank <= min(matrix.shape):
        return matrix
    return low_rank.truncated_svd(matrix, min(matrix.shape)).lowrank()


def _shape(source: CheckpointSource, name: str) -> tuple[int, int]:
    for parameter in source.parameters:
        if parameter.name == name:
            return parameter.shape
    raise PluginError(f"the prediction names '{name}', which the run does not have")


_R = TypeVar("_R", bound=Resolved)


def _validated(prediction: Prediction, name: str, moved: _R) -> _R:
    tensors: tuple[Tensor, ...]
    if isinstance(moved, FactorStep):
        tensors = (moved.dA, moved.dB)
    elif isinstance(moved, Blend):
        tensors = (torch.tensor(list(moved.weights.values())),)
        if moved.matrix is not None:
            tensors = (*tensors, moved.matrix.left, moved.matrix.right)
    elif isinstance(moved, LowRank):
        tensors = (moved.left, moved.right)
    else:
        tensors = (moved,)
    if not all(bool(torch.isfinite(tensor.sum())) for tensor in tensors):
        raise _not_finite(prediction, name)
    return moved


def _not_finite(prediction: Prediction, name: str) -> GuardError:
    return GuardError(f"the jump of '{name}' at step {prediction.step} is not finite; nothing was changed")

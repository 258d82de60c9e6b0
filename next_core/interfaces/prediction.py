"""Predictions: where the weights are going, and how far each parameter has to move.

The anchor is resolved here and nowhere else, so that a cumulative prediction cannot be added twice.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from next_core.errors import GuardError, wrong_answer
from next_core.interfaces.checkpoint_source import CheckpointSource
from next_core.interfaces.weight_delta import FactorStep, LazyDelta, Resolved, WeightDelta, merged
from next_core.mathematics import low_rank
from next_core.mathematics.low_rank import LowRank
from next_core.process.optional_packages import import_optional
from next_core.types import Anchor, Parameter, Space

ROUNDING = 1e-12
"""Weights whose sum is below this share of the sum of their absolute values sum to zero."""


@dataclass(frozen=True)
class CoefficientUpdate:
    """A delta over the observed checkpoints, sum_i weights[t_i] G_{t_i}, counted from the anchor.

    ``space="merged"`` sums the deltas G_t of the weight matrix. ``space="factors"`` (LoRA only) moves the trained A and
    B each by the same sum of their own past values; if the weights do not sum to zero, step 0 (the adapter as
    initialised, B = 0) takes the remainder.
    """

    weights: Mapping[int, float]
    space: Space = "merged"

    def __post_init__(self) -> None:
        """Raise ``PluginError`` for weights that are no mapping, or an unknown space."""
        if not isinstance(self.weights, Mapping) or self.space not in get_args(Space):
            raise wrong_answer(
                f"a CoefficientUpdate takes weights by step and one of {', '.join(get_args(Space))} "
                f"(got {type(self.weights).__name__}, {self.space!r})"
            )


@dataclass(frozen=True)
class LowRankUpdate:
    """A delta given as a low-rank matrix (m, n), counted from the anchor."""

    matrix: LowRank


Update = CoefficientUpdate | LowRankUpdate


@dataclass(frozen=True, repr=False)
class Prediction:
    """Where the weights will be ``horizon`` steps after ``step``, the newest checkpoint.

    The updates count from ``anchor``: the newest checkpoint or the backbone. A parameter without an update stays where
    it is; ``abstained`` gives the reason. ``abstention`` says why the predictor declines to predict anything at all.
    """

    source: CheckpointSource
    step: int
    horizon: int
    anchor: Anchor = "newest"
    updates: Mapping[str, Update] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)
    """A factor on alpha by parameter, finite and not negative; 1 where it is missing."""
    abstained: Mapping[str, str] = field(default_factory=dict)
    abstention: str | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def weight(self, name: str) -> float:
        """Return the factor on alpha of one parameter. Raises ``PluginError`` for a negative one."""
        weight = self.confidence.get(name, 1.0)
        if weight < 0.0:  # it would reverse the jump
            raise wrong_answer(f"the confidence of '{name}' is {weight}; it must be 0 or more")
        return weight

    @functools.cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        return {parameter.name: parameter for parameter in self.source.parameters}

    def parameter(self, name: str) -> Parameter:
        """Return a parameter that is predicted. Raises ``PluginError`` when the run does not have it."""
        if name not in self._parameters:
            raise wrong_answer(f"the prediction names '{name}', which the run does not have; correct the predictor")
        return self._parameters[name]

    @property
    def moving(self) -> list[str]:
        """The parameters that move."""
        return [name for name in self.updates if self.weight(name) != 0.0]

    @property
    def moved_share(self) -> float:
        """The share of the weights that the run trains, those that are no matrices included, in matrices that move."""
        known = [self._parameters[name] for name in self.moving if name in self._parameters]
        return sum(math.prod(parameter.shape) for parameter in known) / max(1, self.source.trained_weights)

    def moved(self) -> str:
        """Return how much of the model moves, for people."""
        share = f", {self.moved_share:.1%} of the weights" if self.source.stores_full_weights else ""
        return f"{len(self.moving)} of {len(self.source.parameters)} matrices{share}"

    def delta(self, name: str, alpha: float = 1.0) -> LowRank | Tensor:
        """Return the move of one weight matrix (m, n) from the newest checkpoint; zero where nothing is predicted.

        Raises ``GuardError`` when it is not finite, ``PluginError`` for a parameter that the run does not have.
        """
        shape = self.parameter(name).shape
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
        what = self.abstention or f"{self.moved()} move"
        return f"<Prediction from step {self.step} by {self.horizon} steps: {what}>"


_R = TypeVar("_R", bound=Resolved)


def resolve(prediction: Prediction, name: str, alpha: float) -> Resolved | None:
    """Return alpha * confidence * (predicted - W_T) of one parameter; None where nothing moves.

    Factors are in fp64. A dense parameter of a source that can read single rows gives a ``LazyDelta``, which has read
    nothing yet. Raises ``GuardError`` when the move is not finite, and ``PluginError`` for an update of another shape,
    an unknown parameter, a negative confidence or steps that the run does not have.
    """
    update = prediction.updates.get(name)
    scale = alpha * prediction.weight(name)
    if update is None or scale == 0.0:
        return None
    parameter = prediction.parameter(name)
    if isinstance(update, LowRankUpdate):
        return _checked(prediction, name, _from_matrix(prediction, parameter, update.matrix.to(torch.float64), scale))
    weights = coefficients(prediction, name, alpha)
    if all(step == 0 for step in weights):
        return None
    moved: Resolved
    if _reads_rows(prediction.source, parameter):
        moved = _lazy(prediction, parameter, weights)
    elif update.space == "factors" and prediction.source.factors(name, prediction.step) is not None:
        moved = _factor_step(prediction, name, weights)
    else:
        moved = _sum_of_deltas(prediction, parameter, weights)
    return _checked(prediction, name, moved)


def coefficients(prediction: Prediction, name: str, alpha: float) -> dict[int, float]:
    """Return the coefficient of each step's W_t - W_0 in alpha * confidence * (predicted - W_T).

    For a parameter with a ``CoefficientUpdate``. Raises ``GuardError`` when one is not finite, ``PluginError`` for a
    step that was not observed.
    """
    update, scale = prediction.updates[name], alpha * prediction.weight(name)
    assert isinstance(update, CoefficientUpdate)
    weights = dict(update.weights)
    for step in weights:
        if step != 0 and step not in prediction.source.steps:
            raise wrong_answer(
                f"the update of '{name}' weighs step {step!r}, which was not observed; "
                f"observed: {prediction.source.steps}; correct the predictor"
            )
    if prediction.anchor == "backbone":  # counted from W_0: subtract what the newest checkpoint already has
        weights[prediction.step] = weights.get(prediction.step, 0.0) - 1.0
    weights = {step: scale * weight for step, weight in weights.items() if weight != 0.0}
    if not all(math.isfinite(weight) for weight in weights.values()):  # their sum may hide it
        raise _not_finite(prediction, name)
    return weights


def weight_delta(prediction: Prediction, name: str, alpha: float) -> WeightDelta | None:
    """Return what ``resolve`` does, with a ``LazyDelta`` read into the whole matrix."""
    moved = resolve(prediction, name, alpha)
    return _checked(prediction, name, moved.dense()) if isinstance(moved, LazyDelta) else moved


def weight_deltas(prediction: Prediction, alpha: float) -> Iterator[tuple[str, WeightDelta]]:
    """Yield the name and the move of every parameter that moves, one at a time."""
    for name in sorted(prediction.updates):
        moved = weight_delta(prediction, name, alpha)
        if moved is not None:
            yield name, moved


def jump_norms(prediction: Prediction, alpha: float) -> dict[str, float]:
    """Return the Frobenius norm of every parameter's move, in merged space; dense ones are read block by block."""
    moves = ((name, resolve(prediction, name, alpha)) for name in sorted(prediction.updates))
    return {
        name: float((moved.merged() if isinstance(moved, FactorStep) else moved).norm())
        for name, moved in moves
        if moved is not None
    }


def _reads_rows(source: CheckpointSource, parameter: Parameter) -> bool:
    """Whether a parameter is dense and the source can read some of its rows without the others."""
    return parameter.kind == "dense" and type(source).delta_rows is not CheckpointSource.delta_rows


def _lazy(
    prediction: Prediction, parameter: Parameter, weights: Mapping[int, float], matrix: LowRank | None = None
) -> LazyDelta:
    """Return sum_t w_t (W_t - W_0), written about W_T: sum_t w_t (W_t - W_T) - (sum_t w_t) (W_0 - W_T).

    The terms of W_T vanish, and that of W_0 where the weights sum to zero, as a secant's do. What remains are
    differences of neighbouring checkpoints: the backbone is not read, and nothing large cancels.
    """
    about: dict[int | None, float] = {step: w for step, w in weights.items() if step not in (0, prediction.step)}
    rest = weights.get(0, 0.0) - sum(weights.values())  # step 0 is where RL began: its own term is W_0 - W_0
    if not abs(rest) <= ROUNDING * sum(map(abs, weights.values())):
        about[None] = rest
    return LazyDelta(prediction.source, parameter.name, parameter.shape, prediction.step, about, matrix)


def _factor_step(prediction: Prediction, name: str, weights: Mapping[int, float]) -> FactorStep:
    rest = -sum(weights.values())
    if abs(rest) > ROUNDING * sum(map(abs, weights.values())):
        weights = {**weights, 0: weights.get(0, 0.0) + rest}
    at = prediction.source.factors(name, prediction.step)
    assert at is not None
    dA, dB = torch.zeros_like(at.A, dtype=torch.float64), torch.zeros_like(at.B, dtype=torch.float64)
    for step, weight in weights.items():
        then = prediction.source.factors(name, step)
        assert then is not None
        dA.add_(then.A, alpha=weight)
        dB.add_(then.B, alpha=weight)
    return FactorStep(dA, dB, at)


def _sum_of_deltas(prediction: Prediction, parameter: Parameter, weights: Mapping[int, float]) -> LowRank | Tensor:
    terms = [(weight, prediction.source.delta(parameter.name, step)) for step, weight in weights.items() if step != 0]
    factored = [delta.scale(weight) for weight, delta in terms if isinstance(delta, LowRank)]
    if len(factored) == len(terms):
        return _narrowed(low_rank.concatenate(factored))
    total = torch.zeros(parameter.shape, dtype=torch.float64)
    for weight, delta in terms:
        total.add_(low_rank.dense(delta), alpha=weight)
    return total


def _from_matrix(prediction: Prediction, parameter: Parameter, matrix: LowRank, scale: float) -> Resolved:
    if matrix.shape != parameter.shape:
        raise wrong_answer(
            f"the update of '{parameter.name}' is {matrix.shape}, not {parameter.shape}; correct the predictor"
        )
    if prediction.anchor == "newest":
        return matrix.scale(scale)
    if _reads_rows(prediction.source, parameter):
        return _lazy(prediction, parameter, {prediction.step: -scale}, matrix.scale(scale))
    trained = prediction.source.delta(parameter.name, prediction.step)
    if isinstance(trained, LowRank):
        return _narrowed((matrix - trained).scale(scale))
    return scale * (matrix.dense() - trained)


def _narrowed(matrix: LowRank) -> LowRank:
    """Return the same matrix with a rank of at most min(m, n)."""
    widest = min(matrix.shape)
    return matrix if matrix.rank <= widest else low_rank.truncated_svd(matrix, widest).lowrank()


def _checked(prediction: Prediction, name: str, moved: _R) -> _R:
    """Return ``moved``. Raises ``GuardError`` when it holds NaN or Inf: a sum is finite only if its terms are."""
    if not all(math.isfinite(tensor.sum()) for tensor in _tensors(moved)):
        raise _not_finite(prediction, name)
    return moved


def _tensors(moved: Resolved | None) -> list[Tensor]:
    if isinstance(moved, FactorStep):
        return [moved.dA, moved.dB]
    if isinstance(moved, LowRank):
        return [moved.left, moved.right]
    if isinstance(moved, LazyDelta):
        return [torch.tensor(list(moved.weights.values())), *_tensors(moved.matrix)]
    return [] if moved is None else [moved]


def _not_finite(prediction: Prediction, name: str) -> GuardError:
    return GuardError(
        f"the jump of '{name}' at step {prediction.step} is not finite; use a smaller alpha or another predictor",
        kind="numbers-not-finite",
    )

"""A prediction resolved: by how much each parameter moves from the newest checkpoint, anchor and alpha included.

The one place where an anchor is read, so that a cumulative prediction is never added twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core import lowrank
from next_core.errors import CheckpointError, GuardError, PluginError
from next_core.interfaces import CoefficientUpdate, LoraFactors, Prediction
from next_core.lowrank import LowRank


@dataclass(frozen=True)
class FactorStep:
    """A move of the trained adapter's own factors: A += dA, B += dB; ``at`` is where they stand."""

    dA: Tensor  # noqa: N815
    dB: Tensor  # noqa: N815
    at: LoraFactors

    def merged(self) -> LowRank:
        """scaling * ((B + dB)(A + dA) - B A): what the weight matrix moves by."""
        after = self.at.A.double() + self.dA, self.at.B.double() + self.dB
        return lowrank.lora_difference(after, (self.at.A, self.at.B), self.at.scaling)


Displacement = FactorStep | LowRank | Tensor


def displacement(prediction: Prediction, name: str, alpha: float) -> Displacement | None:
    """alpha * confidence * (predicted - W_T) of one parameter, in fp64; None where nothing is predicted.

    Raises ``GuardError`` when it is not finite, ``PluginError`` when its shape is not the parameter's, and
    ``CheckpointError`` when its steps are not the run's.
    """
    update = prediction.updates.get(name)
    scale = alpha * prediction.weight(name)
    if update is None or scale == 0.0:
        return None
    if isinstance(update, CoefficientUpdate):
        weights = dict(update.weights)
        if prediction.anchor == "backbone":  # from W_0 to W_T: subtract what the newest checkpoint already has
            weights[prediction.step] = weights.get(prediction.step, 0.0) - 1.0
        weights = {step: scale * weight for step, weight in weights.items() if weight != 0.0}
        if all(step == 0 for step in weights):
            return None  # exactly where W_T is
        factored = prediction.source.factors(name, prediction.step) is not None
        if update.space == "factors" and factored:
            moved: Displacement = _factor_step(prediction, name, weights)
        else:
            moved = _weighted_sum(prediction, name, weights)
    else:
        moved = _from_lowrank(prediction, name, update.matrix.to(torch.float64), scale)
    return _validated(prediction, name, moved)


def displacements(prediction: Prediction, alpha: float) -> Iterator[tuple[str, Displacement]]:
    """Every parameter that moves, one at a time."""
    for name in sorted(prediction.updates):
        moved = displacement(prediction, name, alpha)
        if moved is not None:
            yield name, moved


def merged(moved: Displacement) -> LowRank | Tensor:
    """A displacement as it acts on the weight matrix."""
    return moved.merged() if isinstance(moved, FactorStep) else moved


def norms(moves: Iterable[tuple[str, Displacement]]) -> dict[str, float]:
    """||displacement||_F of each parameter, in merged space; equal shapes in one batch."""
    found: dict[str, float] = {}
    batches: dict[tuple[int, int, int], dict[str, LowRank]] = {}
    for name, moved in moves:
        delta = merged(moved)
        if isinstance(delta, LowRank):
            batches.setdefault((*delta.shape, delta.rank), {})[name] = delta
        else:
            found[name] = float(delta.norm())
    for batch in batches.values():
        stacked = LowRank.stack(list(batch.values()))
        values = lowrank.inner(stacked, stacked).clamp_min(0).sqrt()
        found.update(zip(batch, values.tolist(), strict=True))
    return found


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
        return _no_wider_than_needed(lowrank.concatenate(factored))
    total = torch.zeros(_shape(prediction, name), dtype=torch.float64)
    for weight, delta in parts:
        assert isinstance(delta, Tensor)
        total.add_(delta, alpha=weight)
    return total


def _from_lowrank(prediction: Prediction, name: str, matrix: LowRank, scale: float) -> LowRank | Tensor:
    if matrix.shape != _shape(prediction, name):
        raise PluginError(f"the update of '{name}' is {matrix.shape}, the parameter {_shape(prediction, name)}")
    if prediction.anchor == "newest":
        return matrix.scale(scale)
    moved_already = prediction.source.delta(name, prediction.step)
    if isinstance(moved_already, LowRank):
        return _no_wider_than_needed((matrix - moved_already).scale(scale))
    return scale * (matrix.dense() - moved_already)


def _no_wider_than_needed(matrix: LowRank) -> LowRank:
    """Exactly the same matrix, of rank at most min(m, n)."""
    if matrix.rank <= min(matrix.shape):
        return matrix
    return lowrank.truncated_svd(matrix, min(matrix.shape)).lowrank()


def _shape(prediction: Prediction, name: str) -> tuple[int, int]:
    for parameter in prediction.source.parameters:
        if parameter.name == name:
            return parameter.shape
    raise PluginError(f"the prediction names '{name}', which the run does not have")


def _validated(prediction: Prediction, name: str, moved: Displacement) -> Displacement:
    if isinstance(moved, FactorStep):
        tensors: tuple[Tensor, ...] = (moved.dA, moved.dB)
    elif isinstance(moved, LowRank):
        tensors = (moved.left, moved.right)
    else:
        tensors = (moved,)
    if not all(bool(torch.isfinite(tensor.sum())) for tensor in tensors):
        raise GuardError(f"the jump of '{name}' at step {prediction.step} is not finite; nothing was changed")
    return moved

"""ridge: regress the coming motion on position and velocity, next-mlp's inputs without its network."""

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, CoefficientConfig, Outcome, PerMatrixPredictor, no_checkpoints_apart


class RidgeConfig(CoefficientConfig):
    """Settings of the ridge regression."""

    use_global: bool = Field(True, description="Regress on the global delta W_t - W_0 (position)")
    use_local: bool = Field(True, description="Regress on the local delta W_t - W_{t-1} per RL step (velocity)")
    alpha_ridge: float = Field(
        1e-3, ge=0, description="Penalty on each coefficient, relative to the sum of squares of its input"
    )

    @model_validator(mode="after")
    def _has_an_input(self) -> Self:
        if not (self.use_global or self.use_local):
            raise ValueError("use_global and use_local are both false, so there is nothing to regress on; set one")
        return self


class Ridge(PerMatrixPredictor):
    """Fit T_t ~ a G_t + b L_t over the pairs of checkpoints ``horizon`` apart, per matrix; predict a G_T + b L_T.

    The linear control for NExt (arXiv 2604.11446): the same inputs, global and local deltas, and the same target
    T_t = W_{t+h} - W_t, with two numbers to learn instead of a network. L_t is per RL step: checkpoints need not be
    evenly spaced. It uses whole deltas, not their rank-k parts: all inner products follow from their Gram matrix.
    """

    name = "ridge"
    config_class = RidgeConfig
    requires = frozenset({"gram"})
    _pairs: list[tuple[int, int]]

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        # At step 0 position and velocity are zero, so it teaches nothing.
        return no_checkpoints_apart([step for step in steps if step != 0], horizon)

    def prepare(self, horizon: int) -> Abstain | None:
        self._pairs = [(i, j) for i, j in self.history.pairs(horizon) if self.history.steps[i] != 0]
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        inputs, targets = _contrasts(matrix.steps, self._pairs)
        used = torch.tensor([self.config.use_global, self.config.use_local])
        inputs = inputs[used]
        gram = matrix.gram()
        # <input, input> and <input, target> summed over the pairs p; s and t run over checkpoints.
        squares = torch.einsum("aps,st,bpt->ab", inputs, gram, inputs)
        products = torch.einsum("aps,st,pt->a", inputs, gram, targets)
        scale = squares.diagonal().sqrt()
        if not bool((scale > 0).any()):
            return Abstain("position and velocity are zero at every observed pair")
        scale = torch.where(scale > 0, scale, 1.0)
        # Standardised, so that the penalty is equal for a long position and a short velocity. pinv, because without a
        # penalty the two inputs may be collinear: with one pair on a straight line, position is a multiple of velocity.
        penalised = squares / scale / scale[:, None]
        penalised.diagonal().add_(self.config.alpha_ridge)
        coefficients = torch.zeros(2, dtype=scale.dtype)
        coefficients[used] = torch.linalg.pinv(penalised, hermitian=True) @ (products / scale) / scale
        a, b = coefficients.tolist()
        before, newest = matrix.steps[-2:]
        b /= newest - before  # a G_T + b L_T with L_T = (G_T - G_{T-1}) / (t_T - t_{T-1})
        return CoefficientUpdate({newest: a + b, before: -b}, self.config.space)


def _contrasts(steps: Sequence[int], pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return positions and velocities (2, pairs, T) and targets (pairs, T) as weights of the T global deltas."""
    # A delta is a combination of the G_t, so every inner product that the regression needs is weights^T Gram weights.
    unit = torch.eye(len(steps), dtype=torch.float64)
    gaps = torch.tensor((0, *steps)).diff().clamp_min(1)  # 0 only at step 0, where no pair starts
    velocity = unit.diff(dim=0, prepend=torch.zeros_like(unit[:1])) / gaps[:, None]
    start, end = [i for i, _ in pairs], [j for _, j in pairs]
    return torch.stack([unit[start], velocity[start]]), unit[end] - unit[start]

"""A predictor as a class, with its own settings and weights that are computed once for the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, CoefficientConfig, Outcome, PerMatrixPredictor


class ParabolaConfig(CoefficientConfig):
    """Settings of the parabola."""

    damping: float = Field(0.5, ge=0, le=1, description="Share of the curvature to continue: 0 is a straight line")


class ParabolaPredictor(PerMatrixPredictor):
    """Extrapolate the parabola through the newest checkpoint and those one and two horizons before it.

    With D_1 = W_T - W_{T-h} and D_2 = W_{T-h} - W_{T-2h}: W_hat = W_T + D_1 + damping (D_1 - D_2).
    """

    name = "parabola"
    config_class = ParabolaConfig
    recommended: ClassVar[Mapping[Literal["schedule", "guards"], Mapping[str, Any]]] = {
        "schedule": {"observe": 30, "every": 5, "horizon": 10, "jump_every": 30}
    }
    _weights: Mapping[int, float]

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        wanted = [steps[-1] - 2 * horizon, steps[-1] - horizon]
        missing = [step for step in wanted if step not in steps]
        return f"parabola: needs checkpoints of steps {missing}; observed: {list(steps)}" if missing else None

    def prepare(self, horizon: int) -> Abstain | None:
        newest, c = self.history.newest, self.config.damping
        self._weights = {newest: 1 + c, newest - horizon: -(1 + 2 * c), newest - 2 * horizon: c}
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return CoefficientUpdate(self._weights, self.config.space)

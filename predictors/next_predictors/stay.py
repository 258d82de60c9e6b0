"""The control: no jump."""

from __future__ import annotations

from next_core.history import MatrixHistory
from next_core.per_matrix import Abstain, Outcome, PerMatrixPredictor


class StayPredictor(PerMatrixPredictor):
    """Predicts no motion, on purpose; the score of every other predictor is reported against it."""

    name = "stay"

    def prepare(self, horizon: int) -> Abstain | None:
        return Abstain("stay: the control makes no jump")

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return Abstain("stay: the control makes no jump")

"""A predictor as a function of one matrix and its history."""

from __future__ import annotations

from next_core import Abstain, CoefficientUpdate, MatrixHistory, matrix_predictor
from next_core.predictor import CoefficientConfig, Outcome


@matrix_predictor("last-step", config=CoefficientConfig)
def last_step(matrix: MatrixHistory, horizon: int, config: CoefficientConfig) -> Outcome:
    """Continue the motion of the last interval."""
    if len(matrix.steps) < 2:
        return Abstain("last-step: needs two checkpoints")
    before, newest = matrix.steps[-2:]
    speed = horizon / (newest - before)
    return CoefficientUpdate({newest: speed, before: -speed}, config.space)

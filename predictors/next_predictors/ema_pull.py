"""ema-pull: pull the weights a little towards their own moving average."""

import math
from typing import ClassVar

from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor, Recommended
from next_core.settings import Settings
from next_predictors.snoo import weights_of_motions

NEGLIGIBLE = 1e-3
"""Older motions that count less than this share of the newest one are left out: each costs reading a checkpoint."""


class EmaPullConfig(Settings):
    """Settings of the pull."""

    strength: float = Field(0.15, gt=0, le=1, description="c: a pull covers c (1 + t)^-kappa of the way to the average")
    kappa: float = Field(0.5, ge=0, description="The average moves by (1 + t)^-kappa of the way at each checkpoint")


class EmaPull(PerMatrixPredictor):
    """PACE (arXiv 2606.25086), with an equal pull for all weights: W_hat = W_T + c (1 + T)^-kappa (ema - W_T).

    After each pull, or checkpoint without one, ema moves by (1 + t)^-kappa towards the weights; it starts at W_0. c and
    kappa are the paper's for Gemma3-1B. The recommended schedule pulls every 5 steps (``uf`` in the paper) and ends in
    a mean of the last checkpoints if that validates better.

    Two things differ from the paper. It divides the pull of each weight by Adam's sqrt(v) (times the learning rate),
    which is in the optimizer and not in the checkpoints; and it ends in ema itself.
    """

    name = "ema-pull"
    space = "factors"
    config_class = EmaPullConfig
    recommended: ClassVar[Recommended] = {
        "schedule": {"observe": 5, "every": 5, "horizon": 5, "jump_every": 5, "alpha": 1.0, "average": 80},
        "guards": {"probe": False},
    }

    def prepare(self, horizon: int) -> Abstain | None:
        # With D_j the motion that RL made before checkpoint j, ema - W_T = -(D_T + f_{T-1} (D_{T-1} + f_{T-2} (...))):
        # f_j is what is left of the distance after the pull at j, if one was made, and after the average's own step.
        pulls = {record["step"]: record["alpha"] for record in self.history.jump_log if record["accepted"]}
        steps = [0, *(step for step in self.history.steps if step > 0)]
        factors = [-self._pull(steps[-1])]
        for step in reversed(steps[1:-1]):
            left = (1.0 - self._rate(step)) * (1.0 - pulls.get(step, 0.0) * self._pull(step))
            if abs(factors[0] * left) < NEGLIGIBLE * abs(factors[-1]):
                break
            factors.insert(0, factors[0] * left)
        self._update = CoefficientUpdate(weights_of_motions(steps[-len(factors) - 1 :], factors), "factors")
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return self._update

    def _rate(self, step: int) -> float:
        """Return the share of the way that the average moves at a step."""
        return math.pow(1.0 + step, -self.config.kappa)

    def _pull(self, step: int) -> float:
        return float(self.config.strength) * self._rate(step)

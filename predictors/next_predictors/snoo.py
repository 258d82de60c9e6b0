"""snoo: an outer optimizer with Nesterov momentum over the motions of K RL steps; Lookahead without momentum."""

import itertools
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor, Recommended, no_checkpoint_before
from next_core.settings import Settings


class SnooConfig(Settings):
    """Settings of the outer optimizer."""

    eta: float = Field(0.8, gt=0, description="Outer learning rate")
    mu: float = Field(0.75, ge=0, lt=1, description="Outer Nesterov momentum; 0 with eta 0.5 is Lookahead")


class Snoo(PerMatrixPredictor):
    """SNOO (arXiv 2510.15830): every K steps the weights take an outer Nesterov step; mu = 0 is Lookahead.

    With D_j the motion of the j-th K steps: m_j = mu m_{j-1} + D_j, slow_j = slow_{j-1} + eta (D_j + mu m_j), and
    training goes on from slow_j. K is the horizon, equal to ``jump_every``. The optimizer keeps its state, as in the
    paper. Over many rounds each step counts eta / (1 - mu) times (3.2 by default), like a larger learning rate.

    eta and mu are the paper's best for its 125M model, where K was 100; it finds K of 5 to 100 about equally good, and
    RL runs are short: K is 20 here. Lookahead (arXiv 1907.08610) is ``mu: 0, eta: 0.5`` with K = 5.
    """

    name = "snoo"
    space = "factors"
    config_class = SnooConfig
    recommended: ClassVar[Recommended] = {
        "schedule": {"observe": 20, "every": 20, "horizon": 20, "jump_every": 20, "alpha": 1.0},
        "guards": {"probe": False},
    }

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return no_checkpoint_before(steps, horizon)

    def prepare(self, horizon: int) -> Abstain | None:
        # Checkpoints are shifted by the jumps since, so that D_j is simply the difference of two of them, and what
        # would be kept as state, slow and m, is a weighted sum of differences: slow_k - W_k =
        # (eta - 1) D_k + eta mu (D_k + mu D_{k-1} + mu^2 D_{k-2} + ...).
        known, ends = {0, *self.history.steps}, [self.history.newest]
        while ends[-1] - horizon in known:
            ends.append(ends[-1] - horizon)
        eta, mu = self.config.eta, self.config.mu
        factors = [eta * mu ** (age + 1) for age in range(len(ends) - 1)]
        factors[0] += eta - 1.0
        self._update = CoefficientUpdate(weights_of_motions(ends[::-1], factors[::-1]), "factors")
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return self._update


def weights_of_motions(steps: Sequence[int], factors: Sequence[float]) -> dict[int, float]:
    """Return the weight of each W_t in sum_j factors[j] (W_{steps[j+1]} - W_{steps[j]}); the weights sum to zero."""
    weights = dict.fromkeys(steps, 0.0)
    for (before, after), factor in zip(itertools.pairwise(steps), factors, strict=True):
        weights[after] += factor
        weights[before] -= factor
    return weights

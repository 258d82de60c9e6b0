"""expo: move on from the backbone by a share of the motion so far."""

from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import CoefficientConfig, Outcome
from next_predictors.rl_extra import RLExtra


class ExpoConfig(CoefficientConfig):
    """Settings of ExPO."""

    share: float = Field(
        0.5,
        gt=0,
        description="Length of the jump as a share of the motion since RL began: the paper's alpha, usually 0.3 or 0.5",
    )


class Expo(RLExtra):
    """ExPO (arXiv 2404.16792): W_hat = W_T + share (W_T - W_0), at any horizon.

    The paper does this once, to a finished model: use ``next-core extrapolate``, or set ``observe`` to the run's steps.
    It searches ``share`` on validation data, and moves vectors (norms, biases) too; here only matrices move.
    """

    name = "expo"
    config_class = ExpoConfig

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return CoefficientUpdate({matrix.steps[-1]: 1.0 + self.config.share}, self.config.space)

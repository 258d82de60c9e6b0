"""rl-extra: RL-Extra's weight extrapolation with the paper's settings."""

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import CoefficientConfig, Outcome, PerMatrixPredictor
from next_core.types import Anchor
from next_predictors.secant import backbone_weights


class RLExtra(PerMatrixPredictor):
    """RL-Extra (arXiv 2601.04537): W_hat = W_0 + beta (W_T - W_0) with beta = (t_T + h) / t_T.

    It continues the mean velocity since the backbone. Only matrices are extrapolated, so norm layers are copied from
    W_T, as in the paper.
    """

    name = "rl-extra"
    config_class = CoefficientConfig

    @property
    def anchor(self) -> Anchor:
        return "backbone"

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return CoefficientUpdate(backbone_weights(matrix.steps[-1], horizon), self.config.space)

"""stay: the control, which makes no jump."""

from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor
from next_core.settings import Settings


class StayConfig(Settings):
    """Settings of the control."""

    jump: bool = Field(
        False, description="Make jumps of length zero, to measure what a jump itself costs, such as a restart"
    )


class Stay(PerMatrixPredictor):
    """Predicts no motion. The score of every other predictor is reported relative to it."""

    name = "stay"
    config_class = StayConfig

    def reads_back(self, horizon: int, every: int) -> int:
        return 0

    def prepare(self, horizon: int) -> Abstain | None:
        return None if self.config.jump else Abstain("the control makes no jump")

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return CoefficientUpdate({matrix.steps[-1]: 0.0})

"""effopd: jumps along the motion since the last power of two, as far as validation accuracy rises."""

from collections.abc import Sequence
from typing import ClassVar

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Outcome, PerMatrixPredictor, Recommended, no_checkpoint_before


class EffOPD(PerMatrixPredictor):
    """EffOPD (arXiv 2605.11739): after steps T = 1, 2, 4, 8, ..., W_hat = W_T + alpha (W_T - W_{T/2}).

    The recommended schedule tries alpha = 2, 4, 6, 8 and 10 while accuracy on the validation prompts strictly rises, so
    that the motion counts 3 to 11 times, and makes no jump if alpha 2 does not raise it.

    Three things differ from the paper, which speeds up distillation: its validation samples answers to 50 prompts, here
    it is the run's own; it leaves embeddings and head alone, here every trained matrix moves; and LoRA runs move in
    factor space. Fewer checkpoints: set ``observe``, ``every`` and ``jump_every`` to 8, and the first jump is at 8.
    """

    name = "effopd"
    space = "factors"
    recommended: ClassVar[Recommended] = {
        "schedule": {"observe": 1, "every": 1, "horizon": 1, "jump_every": 1, "alphas": [2, 4, 6, 8, 10]},
        "guards": {"probe": False, "max_norm_ratio": None},  # the search takes their place
    }

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        newest = steps[-1]
        if newest & (newest - 1):  # a power of two has one bit
            return f"it jumps after steps 1, 2, 4, 8, ...; {newest} is none of them"
        return no_checkpoint_before(steps, newest - newest // 2)

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        newest = matrix.steps[-1]
        return CoefficientUpdate({newest: 1.0, newest // 2: -1.0}, "factors")

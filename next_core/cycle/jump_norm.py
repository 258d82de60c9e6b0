"""The size of a jump against the run's recent motion, measured before the jump is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from next_core.history.history import History
from next_core.interfaces import Prediction
from next_core.interfaces.prediction import jump_norms


@dataclass(frozen=True)
class JumpNorm:
    """The size of a jump beside what RL did lately, Frobenius norms over all matrices, in merged space."""

    jump: float
    recent: float

    @property
    def ratio(self) -> float:
        """jump / recent motion; infinite when nothing moved."""
        return self.jump / self.recent if self.recent > 0 else float("inf") if self.jump > 0 else 0.0


def jump_norm(prediction: Prediction, alpha: float, history: History) -> JumpNorm:
    """Measure a jump before it is made. Raises ``GuardError`` when it is not finite."""
    jump = math.sqrt(sum(norm**2 for norm in jump_norms(prediction, alpha).values()))
    return JumpNorm(jump, recent_motion(history, prediction.horizon))


def recent_motion(history: History, window: int) -> float:
    """||W_T - W_{T-window}||_F over the matrices that move; from where RL began when no checkpoint is that old."""
    older = [step for step in history.steps if step <= history.newest - window]
    since = older[-1] if older else None  # where RL began is ``newest`` steps ago
    squares = history.inner_products([(history.newest, since)])
    return math.sqrt(sum(max(float(square), 0.0) for square in squares.values()))

"""What a jump has to pass, before it is made, right after it, and after some RL steps of recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from next_core.appliers.displacement import jump_norms
from next_core.cycle.schedule import Schedule
from next_core.errors import ConfigError
from next_core.history import History
from next_core.interfaces import Prediction


class Guards(BaseModel):
    """Bounds on a jump. Whatever is refused is journalled, and the run goes on as a plain one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_norm_ratio: float | None = Field(
        10.0, gt=0, description="Bound on the jump's norm over that of the motion in the last `horizon` steps"
    )
    time_limit: float | None = Field(
        3600.0, gt=0, description="Seconds a prediction may take; one that takes longer is ended, and the jump refused"
    )
    probe: bool = Field(True, description="Measure accuracy before and after each jump, where the backend can")
    max_drop: float = Field(0.2, ge=0, le=1, description="Roll back when accuracy falls by more right after the jump")
    recovery: int | None = Field(
        None, ge=1, description="RL steps after which accuracy is measured again, and the jump rolled back if it fails"
    )
    against: Literal["start", "trend"] = Field(
        "start", description="What the run must reach after recovery: where it started, or the trend it was on"
    )
    tolerance: float = Field(0.02, ge=0, le=1, description="Accuracy that recovery may fall short by (noise)")

    @model_validator(mode="after")
    def _consistent(self) -> Guards:
        if self.recovery is not None and not self.probe:
            raise ValueError("recovery needs probe: true; there is nothing else to judge the recovery by")
        return self

    def check(self, schedule: Schedule) -> None:
        """Raise ``ConfigError`` when a recovery window could not end before the run does."""
        if self.recovery is not None and schedule.settle < self.recovery:
            raise ConfigError(
                f"settle ({schedule.settle}) must be at least guards.recovery ({self.recovery}): the last jump has to "
                "be judged before the run ends"
            )


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

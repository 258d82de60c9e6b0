"""One jump: its outcome, and its size relative to the run's recent motion."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from next_core.errors import GuardError, NextCoreError, describe
from next_core.history.history import History
from next_core.interfaces import Applied, Prediction
from next_core.interfaces.prediction import jump_norms


@dataclass(frozen=True)
class Jump:
    """A jump after an RL step, and its outcome.

    Each stage of the cycle (predict, guard, apply, verify) returns a copy with its own fields filled in; a stage that
    refuses the jump clears ``accepted`` and gives the reason.
    """

    step: int
    alpha: float
    accepted: bool = True
    reason: str = ""
    predictor: str = "?"
    horizon: int | None = None
    diagnostics: Mapping[str, float] | None = None
    norm: float | None = None
    norm_ratio: float | None = None
    prediction: Prediction | None = None
    applied: Applied | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    def refused(self, reason: str) -> Self:
        """Return this jump as one that is not made, or that was rolled back."""
        return dataclasses.replace(self, accepted=False, reason=reason)

    def measured(self, history: History) -> Self:
        """Return this jump with its size. Raises ``GuardError`` when it is not finite."""
        assert self.prediction is not None
        norm, ratio = jump_norm(self.prediction, self.alpha, history)
        return dataclasses.replace(self, norm=norm, norm_ratio=ratio)

    def record(self) -> dict[str, Any]:
        """Return the fields of the journal's record; those of a stage that was not reached are left out."""
        fields = ("accepted", "reason", "predictor", "alpha", "norm_ratio")
        reached = [key for key in ("horizon", "diagnostics", "norm") if getattr(self, key) is not None]
        probed = ("accuracy_before", "accuracy_after") if self.applied is not None else ()
        return {key: getattr(self, key) for key in (*fields, *reached, *probed)}


def failure(what: str, error: BaseException) -> str:
    """Return the reason that the journal gives for an error: our own message, or what failed and how."""
    return error.message if isinstance(error, NextCoreError) else f"the {what} failed: {describe(error)}"


def check_origin(prediction: Any, history: History) -> None:
    """Raise ``GuardError`` for what is not a prediction from the newest checkpoint of this history."""
    if not isinstance(prediction, Prediction):
        problem = f"the predictor returned a {type(prediction).__name__} instead of a Prediction"
    elif prediction.source is not history.source:
        problem = "the prediction belongs to another source than the run's"
    elif prediction.step != history.newest:
        problem = f"the prediction counts from step {prediction.step}, and the run is at step {history.newest}"
    else:
        return
    raise GuardError(problem, kind="guard-refused")


def jump_norm(prediction: Prediction, alpha: float, history: History) -> tuple[float, float]:
    """Return the norm of a jump, and its ratio to that of the run's recent motion: infinite when nothing moved.

    Frobenius norms over all matrices, in merged space. Raises ``GuardError`` when the jump is not finite.
    """
    jump = math.sqrt(sum(norm**2 for norm in jump_norms(prediction, alpha).values()))
    recent = recent_motion(history, prediction.horizon)
    return jump, jump / recent if recent > 0 else math.inf if jump > 0 else 0.0


def recent_motion(history: History, window: int) -> float:
    """Return ||W_T - W_{T-window}||_F over the matrices that move; since RL began if no checkpoint is that old."""
    older = [step for step in history.steps if step <= history.newest - window]
    since = older[-1] if older else None  # where RL began is ``newest`` steps ago
    squares = history.inner_products([(history.newest, since)])
    # Inner products of nearly equal deltas can round to a small negative number.
    return math.sqrt(sum(max(float(square), 0.0) for square in squares.values()))

"""adaptive-secant: small jumps along the last motion, by a multiple that adapts to how straight the motion is."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from next_core.history.history import MatrixHistory, motion_grams
from next_core.interfaces import CoefficientUpdate
from next_core.mathematics.agreement import SPAN, agreement, comparable_span
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor, Recommended, no_checkpoint_before
from next_core.settings import Settings

LEAST_MULTIPLE = 1.02  # Multiples below this are treated as 1: no jump
MULTIPLE_OF = "multiple of "  # Prefix of the diagnostics that hold the multiple of each matrix


class AdaptiveSecantConfig(Settings):
    """How the multiple of the observed motion adapts."""

    span: int = Field(SPAN, ge=1, description="Length in RL steps of each of the two successive motions compared")
    every: int = Field(10, ge=1, description="RL steps between two measurements")
    target: float = Field(0.2, ge=0, lt=1, description="Agreement at which the multiple does not change")
    gain: float = Field(1.5, gt=0, description="Growth of the multiple's logarithm per unit of agreement above target")
    limit: float = Field(1.0, gt=0, description="Largest change of this logarithm at once")
    most: float = Field(9.0, gt=1, description="Largest multiple; 9 is a jump of 8 times the motion before it")
    per_matrix: bool = Field(False, description="One multiple per matrix, by its own agreement")


class AdaptiveSecant(PerMatrixPredictor):
    """W_hat = W_T + (m - 1) (W_T - W_{T-h}): the last h steps count m times, in the adapter's own factors.

    The multiple m adapts during training. The agreement lambda = <P, D> / <P, P> is measured for each matrix, with P
    and D two successive motions of ``span`` steps, jumps excluded. Its median is near 1 where training moves in a
    straight line, because its steps are too small, and falls as steps grow; at the best constant learning rate of the
    embedded tasks it is between 0 and 0.2. Every ``every`` steps ln m grows by gain (median - target), and m is never
    below 1: the predictor abstains on a run whose motions do not agree, as at a large learning rate or on a random
    walk. A jump that a guard refused halves m. With ``per_matrix`` each matrix has its own m.

    m is read from the journal's last record. A history without one, such as a recorded run, starts at m = 1.
    """

    name = "adaptive-secant"
    space = "factors"
    config_class = AdaptiveSecantConfig
    requires = frozenset({"gram"})  # where the run has no factors, or no checkpoint of its start
    recommended: ClassVar[Recommended] = {
        "schedule": {
            "observe": 20,
            "every": 2,
            "horizon": 2,
            "alpha": 1.0,
            "jump_every": 2,
            "settle": 10,
            "average": 80,
        },
        "guards": {"probe": False},  # a hundred jumps would need two hundred probes; agreement falls before accuracy
    }

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        missing = no_checkpoint_before(steps, horizon)
        if missing is None and self._span(steps) is None:
            return f"no two successive motions of equal length end at step {steps[-1]}; observed: {list(steps)}"
        return missing

    def reads_back(self, horizon: int, every: int) -> int:
        return max(horizon, 2 * max(int(self.config.span), every))

    def prepare(self, horizon: int) -> Abstain | None:
        newest = self.history.newest
        multiples, measured = self._last_measurement()
        if newest - measured >= self.config.every:
            agreed = self._agreements()
            if isinstance(agreed, Abstain):
                return agreed
            multiples = {name: self._adapted(multiples.get(name, 1.0), value) for name, value in agreed.items()}
            measured = newest
            self.diagnostics["agreement"] = round(statistics.median(agreed.values()), 3)
        multiple = statistics.median(multiples.values())
        self.diagnostics |= {"multiple": multiple, "measured": measured}
        if self.config.per_matrix:
            self.diagnostics |= {f"{MULTIPLE_OF}{name}": value for name, value in multiples.items()}
        if max(multiples.values()) < LEAST_MULTIPLE:
            return Abstain("successive motions agree too little to move further than training does")
        self._multiples = multiples
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        multiple = self._multiples.get(matrix.name, 1.0)
        if multiple < LEAST_MULTIPLE:
            return Abstain("its successive motions agree too little to move further than training does")
        newest = self.history.newest
        return CoefficientUpdate({newest: multiple - 1.0, newest - horizon: 1.0 - multiple}, "factors")

    def _adapted(self, multiple: float, agreed: float) -> float:
        # In the logarithm, so that equal agreements above and below target undo each other.
        change = self.config.gain * (agreed - self.config.target)
        change = min(max(change, -self.config.limit), self.config.limit)
        return float(min(max(multiple * math.exp(change), 1.0), self.config.most))

    def _last_measurement(self) -> tuple[dict[str, float], int]:
        """Return each matrix's multiple so far, and the step of its measurement (long ago if there was none)."""
        for record in reversed(self.history.jump_log):
            facts: Mapping[str, Any] = record.get("diagnostics") or {}
            if facts.get("multiple") is not None:
                common = float(facts["multiple"])
                each = {name: float(facts.get(f"{MULTIPLE_OF}{name}", common)) for name in self.history.names}
                if not record["accepted"] and max(each.values(), default=1.0) >= LEAST_MULTIPLE:
                    each = {name: max(value / 2, 1.0) for name, value in each.items()}
                return each, int(facts["measured"])
        return dict.fromkeys(self.history.names, 1.0), -self.config.every

    def _span(self, steps: Sequence[int]) -> int | None:
        return comparable_span({0, *steps}, steps[-1:], self.config.span)

    def _agreements(self) -> dict[str, float] | Abstain:
        """Return lambda of each matrix, or the median for all, rounded to three digits.

        Later jumps shift the stored checkpoints, which rounds them again; three digits make a resumed run agree.
        """
        history = self.history
        span = self._span(history.steps)
        assert span is not None  # why_not returned None
        newest, middle, first = history.newest, history.newest - span, history.newest - 2 * span
        grams = motion_grams(history, (first, middle, newest))
        each = {name: float(agreement(gram, slice(0, 1), slice(1, 2))) for name, gram in grams.items()}
        found = {name: value for name, value in each.items() if not math.isnan(value)}
        if not found:
            return Abstain(f"no matrix moved from step {first} to {middle}")
        if self.config.per_matrix:
            return {name: round(value, 3) for name, value in found.items()}
        return dict.fromkeys(each, round(statistics.median(found.values()), 3))

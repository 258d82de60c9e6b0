"""Small jumps along what training just did, as many times over as its motion bears: nothing to tune."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from next_core.agreement import SPAN, agreement, comparable_span, motion_grams
from next_core.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate, PluginConfig
from next_core.per_matrix import Abstain, Outcome, PerMatrixPredictor

HARDLY = 1.02
"""A multiple below this is none."""


class AutoConfig(PluginConfig):
    """How the multiple of the observed motion is steered."""

    span: int = Field(SPAN, ge=1, description="RL steps of each of the two successive motions that are compared")
    every: int = Field(10, ge=1, description="RL steps between two comparisons")
    target: float = Field(0.2, ge=0, lt=1, description="Agreement of successive motions at which the multiple stays")
    gain: float = Field(1.5, gt=0, description="Growth of the multiple's logarithm per unit of agreement above it")
    limit: float = Field(1.0, gt=0, description="Most that this logarithm changes at once")
    most: float = Field(9.0, gt=1, description="Largest multiple; 9 is a jump of 8 times the motion before it")


class AutoPredictor(PerMatrixPredictor):
    """W_hat = W_T + (m - 1) (W_T - W_{T-h}): the last h steps count m times, in the adapter's own factors.

    The multiple m is found as training goes on. lambda = <P, D> / <P, P> is measured of each matrix, P and D two
    successive motions of ``span`` steps; jumps are not in them. Its median is near 1 where RL goes straight on, because
    its steps are too short for the path, and falls as steps grow; at the best constant learning rate of the embedded
    tasks it is between 0 and 0.2. Every ``every`` steps ln m grows by gain (median - target), and m never is below 1: a
    run whose motion does not agree with itself, as at a large learning rate or on a random walk, is left alone.
    Where the last jump was refused by a guard, m is halved.

    m is read from the journal's last record; a history without one, as of a recorded run, begins at m = 1.
    """

    name = "auto"
    config_class = AutoConfig
    made_for: ClassVar[Mapping[Literal["schedule", "guards"], Mapping[str, Any]]] = {
        "schedule": {
            "observe": 20,
            "every": 2,
            "horizon": 2,
            "alpha": 1.0,
            "jump_every": 2,
            "settle": 10,
            "average": 80,
        },
        "guards": {"probe": False},  # a hundred jumps would be two hundred probes, and agreement falls before accuracy
    }

    def lacks(self, steps: Sequence[int], horizon: int) -> str | None:
        newest, known = steps[-1], {0, *steps}
        if newest - horizon not in known:
            there = sorted(newest - step for step in known if step < newest)
            return f"no checkpoint {horizon} steps before step {newest}; horizons that have one: {there}"
        if self._span(steps) is None:
            return f"no two successive motions of one length end at step {newest}; observed: {list(steps)}"
        return None

    def prepare(self, horizon: int) -> Abstain | None:
        newest = self.history.newest
        multiple, measured = self._last()
        if newest - measured >= self.config.every:
            agreed = self._agreement()
            if isinstance(agreed, Abstain):
                return agreed
            change = self.config.gain * (agreed - self.config.target)
            change = min(max(change, -self.config.limit), self.config.limit)
            multiple, measured = min(max(multiple * math.exp(change), 1.0), self.config.most), newest
            self.diagnostics["agreement"] = agreed
        self.diagnostics |= {"multiple": multiple, "measured": measured}
        if multiple < HARDLY:
            return Abstain("successive motions agree too little to go further than training does")
        self._update = CoefficientUpdate({newest: multiple - 1.0, newest - horizon: 1.0 - multiple}, "factors")
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return self._update

    def _last(self) -> tuple[float, int]:
        """The multiple so far, and the step at which it was measured; long ago where there is none."""
        for record in reversed(self.history.tried):
            facts: Mapping[str, Any] = record.get("diagnostics") or {}
            if facts.get("multiple") is not None:
                multiple = float(facts["multiple"])
                refused = not record["accepted"] and multiple >= HARDLY
                return max(multiple / 2, 1.0) if refused else multiple, int(facts["measured"])
        return 1.0, -self.config.every

    def _span(self, steps: Sequence[int]) -> int | None:
        return comparable_span({0, *steps}, steps[-1:], self.config.span)

    def _agreement(self) -> float | Abstain:
        """The median of lambda over the matrices, to three digits: jumps made later round checkpoints anew."""
        history = self.history
        span = self._span(history.steps)
        assert span is not None  # lacks() has seen to it
        newest, middle, first = history.newest, history.newest - span, history.newest - 2 * span
        grams = motion_grams(history, (first, middle, newest)).values()
        each = [float(agreement(gram, slice(0, 1), slice(1, 2))) for gram in grams]
        found = [value for value in each if not math.isnan(value)]
        if not found:
            return Abstain(f"no matrix moved from step {first} to {middle}")
        return round(statistics.median(found), 3)

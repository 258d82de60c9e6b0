"""The straight line through two checkpoints, continued; optionally gated by how well the last one was continued."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from next_core.history.history import History, MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, CoefficientConfig, Outcome, PerMatrixPredictor
from next_core.settings import Settings
from next_core.types import Anchor, Space


class GateConfig(Settings):
    """When to trust a secant: lambda = <P, D> / <P, P>, P and D two successive secants of one matrix.

    lambda is the damping that would have been best last time: 1 where the motion went straight on, 0 where the two
    are unrelated. A matrix's factor on alpha is clip((lambda - floor) / width, 0, 1), times
    clip((median - median_floor) / median_width, 0, 1) with the median over the matrices.
    """

    window: int = Field(25, ge=1, description="RL steps that each of the two secants P and D spans")
    floor: float = Field(0.2, description="lambda at or below which a matrix stays put")
    width: float = Field(0.4, gt=0, description="From floor to floor + width the factor on alpha grows from 0 to 1")
    median_floor: float = Field(0.25, description="Median lambda at or below which nothing is predicted")
    median_width: float = Field(
        0.25, gt=0, description="From median_floor to median_floor + median_width all factors grow from 0 to 1"
    )


class SecantConfig(CoefficientConfig):
    """Settings of the secant."""

    anchor: Anchor = Field(
        "newest",
        description="newest: the mean velocity over the last window goes on; backbone: that over the whole run",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="RL steps between the two checkpoints of the secant (anchor: newest); none: as many as the horizon",
    )
    damping: float = Field(1.0, gt=0, description="Factor lambda on the extrapolated motion; 1 is the secant itself")
    space: Space = Field(
        "factors",
        description="What is extrapolated: the LoRA factors A and B themselves (factors), or the weight matrices "
        "(merged). A run without LoRA has no factors: both mean merged there",
    )
    gate: GateConfig | None = Field(None, description="Scale each matrix by how straight its motion was; none: no gate")


class Secant(PerMatrixPredictor):
    """Linear weight extrapolation (ExPO; RL-Extra, arXiv 2601.04537), from the newest checkpoint or the backbone.

    Newest: W_hat = W_T + lambda (h / g) (W_T - W_{T-g}), g the window. Backbone: W_hat = W_0 + (1 + lambda (beta - 1))
    (W_T - W_0) with beta = (t_T + h) / t_T, the same line drawn from W_0.
    """

    name = "secant"
    config_class = SecantConfig
    requires = frozenset({"gram"})
    _update: CoefficientUpdate
    _gate: Gate | None

    @property
    def anchor(self) -> Anchor:
        anchor: Anchor = self.config.anchor
        return anchor

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        newest, known = steps[-1], {0, *steps}
        window = horizon if self.config.window is None else self.config.window
        if self.anchor == "newest" and newest - window not in known:
            there = sorted(newest - step for step in known if step < newest)
            return f"no checkpoint {window} steps before step {newest}; windows that are: {there}"
        gate = self.config.gate
        if gate is not None and not {newest - gate.window, newest - 2 * gate.window} <= known:
            needs = f"needs checkpoints {gate.window} and {2 * gate.window} steps before step {newest}"
            return f"gate: {needs}; observed: {list(steps)}"
        return None

    def prepare(self, horizon: int) -> Abstain | None:
        self._update = CoefficientUpdate(self._weights(horizon), self.config.space)
        self._gate = None
        if self.config.gate is not None:
            gate = measure(self.history, self.config.gate)
            if isinstance(gate, Abstain):
                return gate
            self.diagnostics["median_lambda"] = gate.median
            self._gate = gate
            return gate.closed()
        return None

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        if self._gate is None:
            return self._update
        confidence = self._gate.confidence(matrix.name)
        return confidence if isinstance(confidence, Abstain) else (self._update, confidence)

    def _weights(self, horizon: int) -> Mapping[int, float]:
        steps, newest = self.history.steps, self.history.newest
        if self.anchor == "backbone":
            return backbone_weights(newest, horizon, self.config.damping)
        window = horizon if self.config.window is None else self.config.window
        c = self.config.damping * horizon / window
        # A step 0 without a checkpoint is where RL began, whose delta is zero.
        return {newest: c, newest - window: -c} if newest - window in steps else {newest: c}


def backbone_weights(newest: int, horizon: int, damping: float = 1.0) -> dict[int, float]:
    """The coefficient of W_T - W_0, counted from W_0: 1 + damping (beta - 1), beta = (t_T + h) / t_T."""
    return {newest: 1.0 + damping * horizon / newest}


@dataclass(frozen=True)
class Gate:
    """The lambdas of one moment; NaN for a matrix that stood still over the earlier secant."""

    config: GateConfig
    lambdas: Mapping[str, float]
    median: float

    @property
    def opening(self) -> float:
        """The factor on all matrices."""
        return _clip((self.median - self.config.median_floor) / self.config.median_width)

    def closed(self) -> Abstain | None:
        """The reason when the median says that the run does not go straight on."""
        if self.opening > 0.0:
            return None
        return Abstain(
            f"gate: median lambda {self.median:.3f} is not above {self.config.median_floor:g}: "
            "recent motion does not go on"
        )

    def confidence(self, name: str) -> float | Abstain:
        """The factor on alpha of one matrix."""
        own = self.lambdas[name]
        if math.isnan(own):
            return Abstain("gate: lambda is undefined, the matrix stood still over the earlier window")
        factor = _clip((own - self.config.floor) / self.config.width)
        if factor == 0.0:
            return Abstain(f"gate: lambda {own:.3f} is not above {self.config.floor:g}")
        return factor * self.opening


def measure(history: History, config: GateConfig) -> Gate | Abstain:
    """lambda of every moving matrix at the newest checkpoint, from the inner products of P and D."""
    newest, window = history.newest, config.window
    first, middle = newest - 2 * window, newest - window
    # A step 0 without a checkpoint is where RL began.
    spans = ((middle, first if first in history.steps else None), (newest, middle))
    products = history.inner_products(spans)
    lambdas = {name: _lambda(*products[name].flatten().tolist()) for name in history.names}
    defined = [value for value in lambdas.values() if math.isfinite(value)]
    if not defined:
        return Abstain(f"gate: no matrix moved from step {first} to {middle}")
    return Gate(config, lambdas, statistics.median(defined))


def _lambda(PP: float, PD: float, _: float, DD: float) -> float:
    """<P, D> / <P, P>; NaN where P is nothing beside D."""
    return PD / PP if PP > 1e-12 * DD else math.nan


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)

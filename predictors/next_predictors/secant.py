"""secant: continue the straight line through two checkpoints, optionally gated by how straight the motion was."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from next_core.history.history import History, MatrixHistory
from next_core.interfaces import CoefficientUpdate
from next_core.predictor import Abstain, CoefficientConfig, Outcome, PerMatrixPredictor, no_checkpoint_before
from next_core.settings import Settings
from next_core.types import Anchor, Space


class GateConfig(Settings):
    """When to trust a secant: lambda = <P, D> / <P, P> with P and D two successive secants of one matrix.

    lambda is the damping that would have predicted D from P best (least squares): 1 where the motion was straight, 0
    where the two are unrelated. A matrix's factor on alpha is clip((lambda - floor) / width, 0, 1), times
    clip((median - median_floor) / median_width, 0, 1) with the median over the matrices.
    """

    window: int = Field(25, ge=1, description="Length of each of the two secants P and D in RL steps")
    floor: float = Field(0.2, description="A matrix with lambda at or below this does not move")
    width: float = Field(0.4, gt=0, description="The factor on alpha grows from 0 to 1 between floor and floor + width")
    median_floor: float = Field(0.25, description="Nothing is predicted if the median lambda is at or below this")
    median_width: float = Field(
        0.25, gt=0, description="All factors grow from 0 to 1 between median_floor and median_floor + median_width"
    )


class SecantConfig(CoefficientConfig):
    """Settings of the secant."""

    anchor: Anchor = Field(
        "newest", description="newest: continue the mean velocity over the last window; backbone: over the whole run"
    )
    window: int | None = Field(
        None, ge=1, description="RL steps between the two checkpoints of the secant (anchor: newest); none: the horizon"
    )
    damping: float = Field(1.0, gt=0, description="Factor on the extrapolated motion; 1 is the secant itself")
    space: Space = Field(
        "factors",
        description="What is extrapolated: the LoRA factors A and B (factors), or the weight matrices (merged). "
        "Without LoRA both mean merged",
    )
    gate: GateConfig | None = Field(None, description="Scale each matrix by how straight its motion was; none: off")


class Secant(PerMatrixPredictor):
    """Linear weight extrapolation (ExPO, arXiv 2404.16792; RL-Extra, arXiv 2601.04537).

    anchor newest: W_hat = W_T + lambda (h / g) (W_T - W_{T-g}) with g the window and lambda the damping. anchor
    backbone: W_hat = W_0 + (1 + lambda (beta - 1)) (W_T - W_0) with beta = (t_T + h) / t_T.
    """

    name = "secant"
    config_class = SecantConfig
    requires = frozenset({"gram"})
    _update: CoefficientUpdate
    _gate: Gate | None

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        gate = self.config.gate
        needed = [("", self._window(horizon))] if self.anchor == "newest" else []
        needed += [] if gate is None else [("gate: ", gate.window), ("gate: ", 2 * gate.window)]
        for label, distance in needed:
            reason = no_checkpoint_before(steps, distance)
            if reason is not None:
                return label + reason
        return None

    def reads_back(self, horizon: int, every: int) -> int | None:
        if self.anchor == "backbone":
            return None
        gate = 0 if self.config.gate is None else 2 * int(self.config.gate.window)
        return max(self._window(horizon), gate)

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
        window = self._window(horizon)
        c = self.config.damping * horizon / window
        # Weights that sum to zero need no initial adapter in factor space, and the backbone cancels.
        # A step 0 without a checkpoint is where RL began: its global delta is zero.
        return {newest: c, newest - window: -c} if newest - window in steps else {newest: c}

    def _window(self, horizon: int) -> int:
        return horizon if self.config.window is None else int(self.config.window)


def backbone_weights(newest: int, horizon: int, damping: float = 1.0) -> dict[int, float]:
    """Return the coefficient of W_T - W_0, counted from W_0: 1 + damping (beta - 1) with beta = (t_T + h) / t_T."""
    return {newest: 1.0 + damping * horizon / newest}


@dataclass(frozen=True)
class Gate:
    """The lambda of each matrix at one step; NaN for a matrix that did not move over the earlier secant."""

    config: GateConfig
    lambdas: Mapping[str, float]
    median: float

    @property
    def opening(self) -> float:
        """The factor on alpha of all matrices."""
        return _clip((self.median - self.config.median_floor) / self.config.median_width)

    def closed(self) -> Abstain | None:
        """Return the reason if the median shows that the run's motion is not straight, else None."""
        if self.opening > 0.0:
            return None
        return Abstain(
            f"gate: median lambda {self.median:.3f} is not above {self.config.median_floor:g}: "
            "recent motion did not continue in its direction"
        )

    def confidence(self, name: str) -> float | Abstain:
        """Return the factor on alpha of one matrix, or why it does not move."""
        own = self.lambdas[name]
        if math.isnan(own):
            return Abstain("gate: lambda is undefined, because the matrix did not move over the earlier window")
        factor = _clip((own - self.config.floor) / self.config.width)
        if factor == 0.0:
            return Abstain(f"gate: lambda {own:.3f} is not above {self.config.floor:g}")
        return factor * self.opening


def measure(history: History, config: GateConfig) -> Gate | Abstain:
    """Return lambda of every moving matrix at the newest checkpoint, from the inner products of P and D."""
    newest, middle, first = (history.newest - count * config.window for count in range(3))
    products = history.inner_products([history.span(middle, first), history.span(newest, middle)])
    lambdas = {name: _lambda(*products[name].flatten().tolist()) for name in history.names}
    defined = [value for value in lambdas.values() if math.isfinite(value)]
    if not defined:
        return Abstain(f"gate: no matrix moved from step {first} to {middle}")
    return Gate(config, lambdas, statistics.median(defined))


def _lambda(PP: float, PD: float, _: float, DD: float) -> float:
    """Return <P, D> / <P, P>, or NaN where P is negligible relative to D."""
    # The lambda that minimises |D - lambda P|. 1e-12 bounds squares: where |P| < 1e-6 |D|, P may be only rounding.
    return PD / PP if PP > 1e-12 * DD else math.nan


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)

"""step-scale: the trainer's own steps, larger while their gradients agree and slowly smaller once they cancel."""

import math
from typing import ClassVar, Literal

from pydantic import Field

from next_core.predictor import Recommended
from next_core.step_predictor import StepConfig, StepHistory, StepPredictor, StepScale

TOO_FAST = -0.1  # Below this cosine of the first two blocks, steps have done damage that the reward does not show yet
RESTART = 4.0  # A run that starts again divides its multiple by this
CLEAR, FASTER = 0.5, 1.6
"""This far above the target, steps are about five times too small or more, and the gain is larger by this factor."""
AGAIN = 0.3  # This far above the target, the steps that seemed to cancel did so by chance, and the multiple rises again
SLOWER = 0.4  # The gain once the learning rate is found, relative to that before
LIMIT = 1.0  # The largest change of the multiple's logarithm at once
CAUTION = 60  # RL steps after a collapse for which the multiple stays below half of the one that led to it
Phase = Literal["searching", "rising", "found"]
PHASES: tuple[Phase, ...] = ("searching", "rising", "found")


class StepScaleConfig(StepConfig):
    """How the multiple follows the agreement of motions."""

    target: float = Field(0.0, gt=-1, lt=1, description="Cosine of successive motions at which the multiple stays")
    gain: float = Field(0.8, gt=0, description="Growth of the multiple's logarithm per block and unit of cosine")
    decay: float = Field(0.5, ge=0, description="Once it has been reached, the multiple falls as steps ** -decay")
    lead: float = Field(0.3, ge=0, description="How far a falling cosine is extrapolated, in blocks")
    least: float = Field(1e-4, gt=0, le=1, description="Smallest multiple")
    most: float = Field(1e4, ge=1, description="Largest multiple")
    restart: bool = Field(True, description="Start again with smaller steps when the first two blocks cancel")


class StepScalePredictor(StepPredictor):
    """Controls the learning rate: after each block of steps, ln m grows by gain (c - target), until c is at the target.

    c is the cosine of the motions of the last two blocks and of the two before, free of momentum and of m. It is .6 to
    .8 where steps are much too small, between -.1 and .2 early in a run at the best constant learning rate, and about
    -.3 where steps are too large: there the noise of the gradient makes motions cancel. Three phases follow:

    - searching, while no reading was above the target. Where the first two blocks cancel (c below -.1), the run starts
      again from its first weights with m / 4: such steps damage a model before its reward shows it;
    - rising: m grows until c falls to the target, by 1.6 times as much while c is more than .5 above it;
    - found: m falls as steps ** -decay, the classical schedule of a run whose length is not known, since the best rate
      falls along a run, and grows slowly where c is above the target. More than .3 above it, m is rising again.

    After a collapse of the reward, which the cycle undoes, m stays below half of what led to it for 60 steps. Nothing
    depends on the number of steps of the run.
    """

    name = "step-scale"
    config_class = StepScaleConfig
    recommended: ClassVar[Recommended] = {
        "schedule": {"observe": 5, "every": 5, "average": 80},
        "guards": {"probe": False},
    }

    def predict(self, history: StepHistory) -> StepScale:
        phase, before = self._last(history)
        blocks = min(2, len(history.products) // 2)
        cosine, settled = history.cosine(blocks), blocks == 2
        if cosine is None:
            return StepScale(history.multiple, {"phase": PHASES.index(phase)}, found=phase == "found")
        figures = {"agreement": cosine}
        if settled:
            figures["settled"] = 1.0
        elif phase == "searching" and cosine < TOO_FAST and history.step < CAUTION and self._may_restart(history):
            less = max(history.multiple / RESTART, self.config.least)
            return StepScale(less, figures | {"phase": 0.0}, restart=True)
        above = cosine - self.config.target
        if phase == "rising" and settled and before is not None:
            above += self.config.lead * min(cosine - before, 0.0)  # the reading lags: it is of the last 20 steps
        if (phase == "searching" and above > 0) or (phase == "found" and settled and above > AGAIN):
            phase = "rising"
        elif settled and cosine <= self.config.target:
            phase = "found"
        change = min(max(self._change(phase, above, history.step), -LIMIT), LIMIT)
        multiple = min(max(history.multiple * math.exp(change), self.config.least), self._most(history))
        return StepScale(multiple, figures | {"phase": float(PHASES.index(phase))}, found=phase == "found")

    def _change(self, phase: Phase, above: float, step: int) -> float:
        """Return the change of ln m."""
        settings: StepScaleConfig = self.config
        if phase != "found":
            return settings.gain * above * (FASTER if above > CLEAR else 1.0)
        return SLOWER * settings.gain * above if above > 0 else settings.decay * math.log1p(-settings.block / step)

    def _last(self, history: StepHistory) -> tuple[Phase, float | None]:
        """Return the phase so far, and the cosine of the block before, if motions can be compared with it."""
        for record in reversed(history.records):
            figures = record.get("diagnostics") or {}
            if record["event"] == "collapse" and record["back_to"] == 0:
                break
            if record["event"] == "scale" and "phase" in figures:
                before = figures.get("agreement") if figures.get("settled") else None
                return PHASES[int(figures["phase"])], before
        return "searching", None

    def _may_restart(self, history: StepHistory) -> bool:
        return bool(self.config.restart) and history.can_restart and history.multiple > self.config.least

    def _most(self, history: StepHistory) -> float:
        collapses = (r for r in history.records if r["event"] == "collapse" and history.step - r["step"] <= CAUTION)
        return float(min((record["multiple_before"] / 2 for record in collapses), default=self.config.most))

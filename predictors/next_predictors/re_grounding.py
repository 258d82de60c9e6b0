"""re-grounding: RL-Extra's cycle of a few RL steps and many extrapolated ones, with the paper's settings."""

from typing import ClassVar

from pydantic import Field

from next_core.predictor import Recommended
from next_core.types import Space
from next_predictors.secant import Secant, SecantConfig


class ReGroundingConfig(SecantConfig):
    """Settings of re-grounding: those of ``secant``, with other defaults."""

    window: int = Field(20, ge=1, description="m in the paper: RL steps of a segment; equal to `jump_every`")
    space: Space = Field("merged", description="As in `secant`; the paper extrapolates whole matrices")


class ReGrounding(Secant):
    """Periodic re-grounding (RL-Extra, arXiv 2601.04537, Table 2): m RL steps, then n steps along their secant.

    W_hat = W_T + (n / m) (W_T - W_{T-m}), with m the window and n the horizon. The recommended schedule is the paper's
    fastest, (m, n) = (20, 100): each RL step counts six times, as with a learning rate six times as large. Compare the
    two: ``benchmarks/compare/regrounding.yaml``. The paper has no guards and extrapolates vectors (norms) like RL-Extra
    does not; here only matrices move.
    """

    name = "re-grounding"
    config_class = ReGroundingConfig
    recommended: ClassVar[Recommended] = {
        "schedule": {"observe": 20, "every": 20, "horizon": 100, "jump_every": 20, "alpha": 1.0}
    }

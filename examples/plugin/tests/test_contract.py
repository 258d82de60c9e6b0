"""Both predictors pass every check of next-core's conformance kit."""

from __future__ import annotations

from curved_steps.last_step import last_step
from curved_steps.parabola import ParabolaConfig, ParabolaPredictor

from next_core.predictor import TrajectoryPredictor
from next_core.testing import Check, parametrize_with_checks


@parametrize_with_checks([last_step, ParabolaPredictor, ParabolaPredictor(ParabolaConfig(damping=0.0))])
def test_it_keeps_the_contract(plugin: TrajectoryPredictor | type[TrajectoryPredictor], check: Check) -> None:
    check(plugin)

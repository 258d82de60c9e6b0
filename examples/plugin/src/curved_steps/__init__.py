"""Register this package's predictors with next-core; each is imported when a config names it."""

from __future__ import annotations

from next_core.hookspecs import Register, hookimpl


@hookimpl
def register_predictors(register: Register) -> None:
    register("curved_steps.last_step:last_step", name="last-step")
    register("curved_steps.parabola:ParabolaPredictor", name="parabola")

"""Every predictor that is installed with next-core keeps the contract; a new one is checked without being named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from next_core import registry
from next_core.predictor import TrajectoryPredictor
from next_core.testing import Check, parametrize_with_checks

QUICK = {"epochs": 4, "hidden": 8, "lr": 1e-2}
"""Settings of networks that train in milliseconds, and still far enough to predict something."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "alpharl": [{"metric": "reward", "anchor": "newest"}],
    "auto": [{"per_matrix": True}],
    "random": [{"rank": 3}],
    "relex": [{"anchor": "newest", "rank": 2}],
    "secant": [{"anchor": "backbone"}, {"gate": {"window": 10}}],
    "stay": [{"jump": True}],
}
"""Settings under which a predictor does another thing than by default."""


def predictors() -> list[TrajectoryPredictor]:
    ours = [e.name for e in registry().entries() if e.kind == "predictor" and e.distribution == "next-core"]
    found = []
    for name in ours:
        cls = registry().get("predictor", name)
        quick = {key: value for key, value in QUICK.items() if set(QUICK) <= set(cls.config_class.model_fields)}
        found += [cls(cls.config_class(**(quick | more))) for more in ({}, *VARIANTS.get(name, []))]
    return found


def expected(predictor: TrajectoryPredictor) -> Mapping[str, str]:
    if predictor.name != "stay":
        return {}
    reasons = {"predicts_on_its_schedule": "it is the control: it moves nothing, on purpose"}
    if predictor.config.jump:
        reasons["takes_a_full_parameter_run"] = "its jumps are of length zero, on purpose"
    return reasons


@parametrize_with_checks(predictors(), expected_failed_checks=expected)
def test_it_keeps_the_contract(plugin: TrajectoryPredictor, check: Check) -> None:
    check(plugin)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_of_predictors_that_there_are(name: str) -> None:
    assert name in registry().names("predictor")

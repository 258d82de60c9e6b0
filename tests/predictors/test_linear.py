"""Linear predictors continue a straight line and count it once. The conformance kit checks signs, order and inputs."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from next_core.interfaces import Prediction
from next_core.plugins import make_predictor, registry
from next_core.sources.memory import MemorySource
from tests.predictors.trajectories import (
    curve,
    curved_lora_run,
    dense_run,
    drift,
    history,
    linear_lora,
    linear_lora_run,
    relative_error,
    resolve_dense,
)

HORIZON = 30
SMALL_RIDGE = {"alpha_ridge": 1e-9}
PREDICTORS: list[tuple[str, dict[str, Any]]] = [
    ("secant", {}),
    ("secant", {"window": 50}),
    ("secant", {"anchor": "backbone"}),
    ("secant", {"gate": {"window": 10}}),
    ("rl-extra", {}),
    ("re-grounding", {}),
    ("expo", {"share": 0.3}),
    ("alpharl", {}),
    ("alpharl", {"anchor": "newest"}),
    ("relex", {}),
    ("relex", {"anchor": "newest"}),
    ("ridge", SMALL_RIDGE),
    ("ridge", {**SMALL_RIDGE, "use_local": False}),
    ("ridge", {**SMALL_RIDGE, "use_global": False}),
]
# The target of a linear drift is constant, and position alone grows.
LINEAR = [(name, fields) for name, fields in PREDICTORS if "use_local" not in fields]
in_linear = pytest.mark.parametrize(("name", "fields"), LINEAR, ids=str)
# A gate reads the median over the whole run.
in_alone = pytest.mark.parametrize(("name", "fields"), [case for case in PREDICTORS if "gate" not in case[1]], ids=str)
COEFFICIENTS = [case for case in LINEAR if case[0] != "alpharl"]
in_coefficients = pytest.mark.parametrize(("name", "fields"), COEFFICIENTS, ids=str)
SPACES = [(name, {**fields, "space": space}) for name, fields in COEFFICIENTS for space in ("factors", "merged")]


def predict(
    source: MemorySource, name: str, fields: Mapping[str, Any], horizon: int = HORIZON, **view: Any
) -> Prediction:
    return make_predictor(name, **fields).fit(history(source, **view)).predict(horizon)


@in_linear
def test_continues_an_exactly_linear_drift_of_dense_matrices(name: str, fields: dict[str, Any]) -> None:
    prediction = predict(dense_run({"a": drift(1), "b": drift(5, 4, 9)}), name, fields)
    assert prediction.abstention is None
    for matrix, path in (("a", drift(1)), ("b", drift(5, 4, 9))):
        assert relative_error(resolve_dense(prediction, matrix), path(HORIZON)) < 1e-5


@pytest.mark.parametrize(("name", "fields"), [*SPACES, *(case for case in LINEAR if case[0] == "alpharl")], ids=str)
def test_continues_an_exactly_linear_drift_of_lora_factors(name: str, fields: dict[str, Any]) -> None:
    prediction = predict(linear_lora_run(), name, fields)
    for index, matrix in enumerate("ab"):
        drift_of = linear_lora(10 * index, HORIZON)
        assert relative_error(resolve_dense(prediction, matrix), 2.0 * drift_of.B @ drift_of.A) < 1e-5


@in_alone
def test_each_matrix_is_predicted_as_if_it_were_alone(name: str, fields: dict[str, Any]) -> None:
    both, alone = {"a": curve(1), "b": curve(40)}, {"a": curve(1)}
    found, wanted = (resolve_dense(predict(dense_run(paths), name, fields), "a") for paths in (both, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@in_coefficients
def test_spaces_differ_where_both_factors_move(name: str, fields: dict[str, Any]) -> None:
    source = curved_lora_run()
    merged, factors = (resolve_dense(predict(source, name, {**fields, "space": s}), "a") for s in ("merged", "factors"))
    assert merged.any()
    assert relative_error(factors, merged) > 1e-3


def test_rl_extra_is_the_backbone_secant() -> None:
    source = dense_run({"a": curve(1)})
    wanted = predict(source, "secant", {"anchor": "backbone", "space": "merged"})
    found = predict(source, "rl-extra", {})
    assert found.updates == wanted.updates
    # beta = (100 + 30) / 100
    assert dict(found.updates["a"].weights) == {100: pytest.approx(1.3)}


def test_every_setting_of_a_predictor_is_described() -> None:
    for name in registry().names("predictor"):
        fields = registry().get("predictor", name).config_class.model_fields
        assert all(field.description for field in fields.values()), name

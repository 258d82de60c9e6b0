"""What every linear predictor owes: a straight line goes on, counted once, whatever the order and the signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core.errors import ConfigError
from next_core.interfaces import Prediction
from next_core.plugins import Registry, make_predictor, registry
from next_core.predictor import PerMatrixPredictor
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
    still,
    walk,
)

HORIZON = 30
SMALL_RIDGE = {"alpha_ridge": 1e-9}
PREDICTORS: list[tuple[str, dict[str, Any]]] = [
    ("secant", {}),
    ("secant", {"window": 50}),
    ("secant", {"anchor": "backbone"}),
    ("secant", {"gate": {"window": 10}}),
    ("rl-extra", {}),
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
in_all = pytest.mark.parametrize(("name", "fields"), PREDICTORS, ids=str)
in_linear = pytest.mark.parametrize(("name", "fields"), LINEAR, ids=str)
# A gate reads the median over the whole run.
in_alone = pytest.mark.parametrize(("name", "fields"), [case for case in PREDICTORS if "gate" not in case[1]], ids=str)
in_coefficients = pytest.mark.parametrize(("name", "fields"), [c for c in LINEAR if c[0] != "alpharl"], ids=str)
SPACES = pytest.mark.parametrize("space", ["factors", "merged"])


def predict(
    source: MemorySource, name: str, fields: Mapping[str, Any], horizon: int = HORIZON, **view: Any
) -> Prediction:
    return make_predictor(name, **fields).fit(history(source, **view)).predict(horizon)


def resolved(prediction: Prediction) -> dict[str, Tensor]:
    return {p.name: resolve_dense(prediction, p.name) for p in prediction.source.parameters}


@in_linear
def test_continues_an_exactly_linear_drift_of_dense_matrices(name: str, fields: dict[str, Any]) -> None:
    prediction = predict(dense_run({"a": drift(1), "b": drift(5, 4, 9)}), name, fields)
    assert prediction.abstention is None
    for matrix, path in (("a", drift(1)), ("b", drift(5, 4, 9))):
        assert relative_error(resolve_dense(prediction, matrix), path(HORIZON)) < 1e-5


@in_coefficients
@SPACES
def test_continues_an_exactly_linear_drift_of_lora_factors(name: str, fields: dict[str, Any], space: str) -> None:
    prediction = predict(linear_lora_run(), name, {**fields, "space": space})
    for index, matrix in enumerate("ab"):
        drift_of = linear_lora(10 * index, HORIZON)
        assert relative_error(resolve_dense(prediction, matrix), 2.0 * drift_of.B @ drift_of.A) < 1e-5


@pytest.mark.parametrize("anchor", ["newest", "backbone"])
def test_alpharl_continues_an_exactly_linear_drift_of_lora_factors(anchor: str) -> None:
    prediction = predict(linear_lora_run(), "alpharl", {"anchor": anchor})
    drift_of = linear_lora(0, HORIZON)
    assert relative_error(resolve_dense(prediction, "a"), 2.0 * drift_of.B @ drift_of.A) < 1e-5


@pytest.mark.parametrize("name", ["secant", "alpharl", "relex"])
def test_counts_the_motion_once_from_either_anchor(name: str) -> None:
    source = dense_run({"a": drift(1)})
    newest = predict(source, name, {"anchor": "newest"})
    backbone = predict(source, name, {"anchor": "backbone"})
    assert (newest.anchor, backbone.anchor) == ("newest", "backbone")
    found = [resolve_dense(prediction, "a") for prediction in (newest, backbone)]
    assert relative_error(found[0], found[1]) < 1e-9
    assert float(found[0].norm() / drift(1)(HORIZON).norm()) == pytest.approx(1.0)


@in_all
def test_names_frozen_matrices_and_leaves_them_alone(name: str, fields: dict[str, Any]) -> None:
    prediction = predict(dense_run({"a": drift(1), "embedding": still()}), name, fields)
    assert set(prediction.updates) == {"a"}
    assert prediction.abstained == {"embedding": "did not move since step 90"}
    assert not resolve_dense(prediction, "embedding").any()


@in_all
@pytest.mark.parametrize("make", [curve, walk])
def test_does_not_depend_on_the_order_of_matrices(name: str, fields: dict[str, Any], make: Any) -> None:
    paths = {"a": make(1), "b": make(40), "c": drift(90, 4, 9)}
    source = dense_run(paths)
    checkpoints = {t: {n: source._value(n, t) for n in ("c", "b", "a")} for t in source.steps}
    turned = resolved(predict(MemorySource(checkpoints, source._backbone), name, fields))
    for matrix, found in resolved(predict(source, name, fields)).items():
        torch.testing.assert_close(turned[matrix], found, rtol=1e-12, atol=0)


@in_alone
def test_each_matrix_is_predicted_as_if_it_were_alone(name: str, fields: dict[str, Any]) -> None:
    both, alone = {"a": curve(1), "b": curve(40)}, {"a": curve(1)}
    found, wanted = (resolve_dense(predict(dense_run(paths), name, fields), "a") for paths in (both, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@in_all
@pytest.mark.parametrize("rank", [1, 3])
def test_does_not_depend_on_the_signs_of_an_svd(name: str, fields: dict[str, Any], rank: int) -> None:
    source = dense_run({"a": curve(1), "b": curve(40)})
    wanted = resolved(predict(source, name, fields, rank=rank))
    for seed in range(3):
        for matrix, found in resolved(predict(source, name, fields, rank=rank, signs=seed)).items():
            torch.testing.assert_close(found, wanted[matrix], rtol=1e-9, atol=1e-12)


@in_all
def test_two_predictions_are_equal_to_the_bit(name: str, fields: dict[str, Any]) -> None:
    source = dense_run({"a": curve(1), "b": walk(40)})
    first, second = (resolved(predict(source, name, fields)) for _ in range(2))
    assert all(torch.equal(first[matrix], second[matrix]) for matrix in first)


@in_coefficients
def test_spaces_differ_where_both_factors_move(name: str, fields: dict[str, Any]) -> None:
    source = curved_lora_run()
    merged, factors = (resolve_dense(predict(source, name, {**fields, "space": s}), "a") for s in ("merged", "factors"))
    assert merged.any()
    assert relative_error(factors, merged) > 1e-3


@in_coefficients
def test_factors_mean_merged_on_a_run_without_lora(name: str, fields: dict[str, Any]) -> None:
    source = dense_run({"a": curve(1)})
    merged, factors = (predict(source, name, {**fields, "space": s}).updates["a"] for s in ("merged", "factors"))
    assert merged == factors


@pytest.mark.parametrize("name", ["rl-extra", "relex", "ridge"])
def test_factor_space_needs_the_adapter_as_initialised(name: str) -> None:
    source = curved_lora_run(steps=tuple(range(10, 110, 10)))
    prediction = predict(source, name, {"space": "factors"})
    assert not prediction.updates
    assert prediction.abstention is not None
    assert "step 0; keep one, or set space: merged" in prediction.abstention
    assert predict(source, name, {"space": "merged"}).abstention is None


@in_all
def test_says_so_when_training_changed_nothing(name: str, fields: dict[str, Any]) -> None:
    prediction = predict(dense_run({"a": still()}), name, fields)
    assert prediction.abstention == "no matrix moved since step 90: did training change the weights?"
    only_one = predict(dense_run({"a": still()}, steps=[10]), name, fields)
    assert only_one.abstention == "no matrix moved since the backbone: did training change the weights?"


@in_all
@pytest.mark.parametrize("horizon", [0, -5])
def test_refuses_a_horizon_that_is_not_ahead(name: str, fields: dict[str, Any], horizon: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: horizon .* at least 1 \(got {horizon}\)"):
        predict(dense_run({"a": drift(1)}), name, fields, horizon)


def test_stay_makes_no_jump_and_says_that_it_is_on_purpose() -> None:
    prediction = predict(dense_run({"a": drift(1), "b": still()}), "stay", {})
    assert prediction.abstention == "stay: the control makes no jump"
    assert not prediction.updates
    assert set(prediction.abstained) == {"b"}


def test_rl_extra_is_the_backbone_secant() -> None:
    source = dense_run({"a": curve(1)})
    wanted = predict(source, "secant", {"anchor": "backbone", "space": "merged"})
    found = predict(source, "rl-extra", {})
    assert found.updates == wanted.updates
    # beta = (100 + 30) / 100
    assert dict(found.updates["a"].weights) == {100: pytest.approx(1.3)}  # type: ignore[union-attr]


def test_registers_lazily_through_the_plug_in_hook() -> None:
    import next_predictors

    ours = Registry()
    ours.add_plugin(next_predictors)
    linear = ["alpharl", "auto", "random", "relex", "ridge", "rl-extra", "secant", "stay"]
    names = sorted([*linear, "next-mlp", "next-mlp-reduced"])
    assert ours.names("predictor") == names
    assert set(names) <= set(registry().names("predictor"))
    for name in linear:
        cls = ours.get("predictor", name)
        assert issubclass(cls, PerMatrixPredictor)
        assert cls.name == name
        assert all(field.description for field in cls.config_class.model_fields.values())

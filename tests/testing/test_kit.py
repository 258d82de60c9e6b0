"""The kit's plumbing: the checks of every plug-in, the report, expected failures, test ids and synthetic runs."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
from pydantic import ConfigDict, field_validator
from pydantic.json_schema import SkipJsonSchema

from next_core.mathematics.low_rank import dense
from next_core.settings import Settings
from next_core.testing import (
    ContractError,
    check_predictor,
    checks_of,
    dense_run,
    lora_run,
    parametrize_with_checks,
)
from tests.errors import raises_kind
from tests.testing.breaking import COMMON, fails
from tests.testing.test_predictors import Right, fit_that, raise_if


class TwoRanks(Right):
    fit = fit_that(lambda _, history: raise_if(history.rank > 2))


class Drifting(Settings):
    x: int = 0

    @field_validator("x")
    @classmethod
    def one_more(cls, value: int) -> int:
        return value + 1


class Hidden(Settings):
    x: Annotated[int, SkipJsonSchema()] = 0


class Mutable(Settings):
    model_config = ConfigDict(frozen=False)


class Lenient(Settings):
    model_config = ConfigDict(extra="ignore")


class Infinite(Settings):
    model_config = ConfigDict(allow_inf_nan=True)


@pytest.mark.parametrize(
    ("check", "overrides"),
    [
        ("has_a_name", {"name": "two words"}),
        ("settings_survive_a_round_trip", {"config_class": Drifting}),
        ("settings_survive_a_round_trip", {"config_class": Hidden}),
        ("settings_are_strict", {"config_class": Mutable}),
        ("settings_are_strict", {"config_class": Lenient}),
        ("settings_are_strict", {"config_class": Infinite}),
    ],
)
def test_a_check_of_every_plugin_fails_on_one_that_breaks_it(check: str, overrides: dict[str, Any]) -> None:
    assert fails(check, "predictor", type("Wrong", (Right,), overrides))


@pytest.mark.parametrize("kind", ["predictor", "source", "applier", "backend"])
def test_every_kind_of_plugin_has_the_common_checks(kind: Any) -> None:
    assert set(checks_of(kind)) > COMMON


def test_the_report_names_the_promise_and_the_place_of_an_exception() -> None:
    with pytest.raises(ContractError) as caught:
        check_predictor(TwoRanks)
    report = str(caught.value)
    for part in ("1 of", "takes_every_rank", checks_of("predictor")["takes_every_rank"].promise, "ValueError", ".py:"):
        assert part in report
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_expected_failure_with_a_reason_is_accepted() -> None:
    check_predictor(TwoRanks, expected_failures={"takes_every_rank": "it knows two"})


def test_an_expected_failure_that_passes_is_reported() -> None:
    expected = {"takes_every_rank": "it knows two", "pickles": "it holds a file"}
    with pytest.raises(ContractError) as caught:
        check_predictor(TwoRanks, expected_failures=expected)
    assert (caught.value.failed, caught.value.passed_unexpectedly) == ({}, {"pickles": "it holds a file"})
    assert all(reason in str(caught.value) for reason in expected.values())


@pytest.mark.parametrize(
    ("expected", "kind", "name"),
    [
        ({"takes_any_rank": "x"}, "config-unknown-key", "takes_every_rank"),
        ({"pickles": " "}, "config-invalid-value", "pickles"),
    ],
)
def test_an_expected_failure_names_a_check_and_has_a_reason(expected: dict[str, str], kind: str, name: str) -> None:
    with raises_kind(kind, name):
        check_predictor(Right, expected_failures=expected)
    with raises_kind(kind, name):
        parametrize_with_checks([Right], expected_failed_checks=lambda plugin: expected)


def test_each_plugin_and_check_is_a_test_with_a_readable_id() -> None:
    plugins = [Right, Right(space="factors")]
    expected = {"pickles": "it holds a file"}
    mark = parametrize_with_checks(plugins, expected_failed_checks=lambda plugin: expected if plugin is Right else {})
    names, parameters = mark.args
    assert names == ("plugin", "check")
    assert len(parameters) == 2 * len(checks_of("predictor"))
    marks = {parameter.id: [(m.name, m.kwargs) for m in parameter.marks] for parameter in parameters}
    assert marks["right-pickles"] == [("xfail", {"reason": "it holds a file", "strict": True})]
    assert marks["right(space=factors)-pickles"] == []


def test_what_is_not_a_plugin_is_refused() -> None:
    with raises_kind("config-invalid-value", "Settings"):
        parametrize_with_checks([Settings])  # type: ignore[list-item]


@pytest.mark.parametrize("make", [lora_run, dense_run])
def test_the_synthetic_runs_follow_from_their_seed(make: Any) -> None:
    one, same, other = (make(seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not any(torch.equal(value, other[name]) for name, value in one.items() if value.any())


@pytest.mark.parametrize("make", [lora_run, dense_run])
def test_a_part_of_a_synthetic_run_has_the_values_of_the_whole(make: Any) -> None:
    whole = make()
    part = whole.only([step for step in whole.weights if step in (0, 10, 20)])
    assert part.steps == (10, 20)
    for parameter in part.parameters:
        assert torch.equal(*(dense(run.delta(parameter.name, 20, 10)) for run in (part, whole)))

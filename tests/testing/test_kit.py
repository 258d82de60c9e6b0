"""The kit itself: what is right passes, each check is failed by what is wrong in just this, and the report says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from next_core.errors import ConfigError
from next_core.settings import Settings
from next_core.testing import (
    ContractError,
    check_predictor,
    checks_of,
    dense_run,
    lora_run,
    parametrize_with_checks,
)
from tests.testing.wrong_predictors import WRONG, Right

BESIDES = {
    "abstains_on_too_few_checkpoints": {"accounts_for_every_matrix", "lacks_agrees_with_what_happens"},
    "does_not_depend_on_the_svds_signs": {"does_not_depend_on_the_order_of_rank_components"},
}
"""Checks that look at some of the same things, and so may fail with another."""


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """One of the wrong predictors turns them off."""
    with torch.enable_grad():
        yield


def failures(plugin: Any) -> set[str]:
    try:
        check_predictor(plugin)
    except ContractError as error:
        return set(error.failed)
    return set()


def test_what_is_right_passes() -> None:
    check_predictor(Right)
    check_predictor(Right())


@pytest.mark.parametrize("name", checks_of("predictor"))
def test_what_is_wrong_in_one_thing_fails_its_check_and_no_other(name: str) -> None:
    found = failures(WRONG[name])
    assert name in found
    assert found - {name} <= BESIDES.get(name, set())


def test_the_error_says_what_was_promised_expected_and_seen() -> None:
    with pytest.raises(ContractError) as caught:
        check_predictor(WRONG["refuses_a_horizon_below_one"])
    assert str(caught.value).splitlines() == [
        f"predictor 'right' fails 1 of {len(checks_of('predictor'))} checks",
        "- refuses_a_horizon_below_one: A horizon of 0 or less is a mistake of the caller: `ConfigError`, and not an "
        "abstention",
        "    expected: predict(0) raises ConfigError",
        "    seen: no error; the answer was a Prediction",
    ]


def test_an_exception_of_the_plugin_is_shown_with_its_place() -> None:
    with pytest.raises(
        ContractError, match=r"expected: no exception\n +seen: ValueError: too many \(.*:\d+\)"
    ) as caught:
        check_predictor(WRONG["takes_every_rank"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_failure_that_is_expected_with_its_reason_is_none() -> None:
    check_predictor(WRONG["takes_every_rank"], expected_failures={"takes_every_rank": "it knows two"})


def test_a_failure_that_was_expected_and_does_not_come_is_one() -> None:
    expected = {"takes_every_rank": "it knows two", "pickles": "it holds a file"}
    with pytest.raises(ContractError) as caught:
        check_predictor(WRONG["takes_every_rank"], expected_failures=expected)
    assert (caught.value.failed, caught.value.passed_unexpectedly) == ({}, {"pickles": "it holds a file"})
    assert "take it out of the expected failures:\n- pickles: it holds a file" in str(caught.value)
    assert "failed as expected:\n- takes_every_rank: it knows two" in str(caught.value)


@pytest.mark.parametrize(
    ("expected", "message"),
    [({"takes_any_rank": "x"}, "did you mean 'takes_every_rank'"), ({"pickles": " "}, "needs a reason")],
)
def test_an_expected_failure_names_a_check_and_has_a_reason(expected: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_predictor(Right, expected_failures=expected)
    with pytest.raises(ConfigError, match=message):
        parametrize_with_checks([Right], expected_failed_checks=lambda plugin: expected)


def test_each_plugin_and_check_is_a_test_with_a_readable_id() -> None:
    plugins = [Right, Right(Right.config_class(space="factors"))]  # type: ignore[call-arg]
    expected = {"pickles": "it holds a file"}
    mark = parametrize_with_checks(plugins, expected_failed_checks=lambda plugin: expected if plugin is Right else {})
    names, parameters = mark.args
    assert names == ("plugin", "check")
    assert len(parameters) == 2 * len(checks_of("predictor"))
    marks = {parameter.id: [(m.name, m.kwargs) for m in parameter.marks] for parameter in parameters}
    assert marks["right-pickles"] == [("xfail", {"reason": "it holds a file", "strict": True})]
    assert marks["right(space=factors)-pickles"] == []


def test_what_there_are_no_checks_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a class nor an instance"):
        parametrize_with_checks([Settings])  # type: ignore[list-item]


@pytest.mark.parametrize("make", [lora_run, dense_run])
def test_the_synthetic_runs_are_those_of_their_seed(make: Any) -> None:
    one, same, other = (make(seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not any(torch.equal(value, other[name]) for name, value in one.items() if value.any())


@pytest.mark.parametrize("make", [lora_run, dense_run])
def test_a_part_of_a_synthetic_run_has_the_values_of_the_whole(make: Any) -> None:
    whole = make()
    part = whole.only([step for step in whole.weights if step in (0, 10, 20)])
    assert part.steps == (10, 20)
    for name in (parameter.name for parameter in part.parameters):
        one, same = (run.delta(name, 20, 10) for run in (part, whole))
        assert torch.equal(*(x if isinstance(x, torch.Tensor) else x.dense() for x in (one, same)))

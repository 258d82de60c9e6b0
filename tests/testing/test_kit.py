"""The kit's plumbing: the check of every plug-in, the report, expected failures, test ids and synthetic runs."""

from typing import Any

import pytest
import torch
from pydantic import ConfigDict, field_validator

from next_core.mathematics.low_rank import dense
from next_core.settings import Settings
from next_core.testing import check_predictor, checks_of, dense_run, lora_run, parametrize_with_checks
from tests.errors import raises_kind
from tests.testing.helpers import COMMON, fails
from tests.testing.test_predictors import Right, fit_that, raise_if


class LowRanks(Right):
    fit = fit_that(lambda _, history: raise_if(history.rank > 2))


class Drifting(Settings):
    x: int = 0

    @field_validator("x")
    @classmethod
    def one_more(cls, value: int) -> int:
        return value + 1


class Lenient(Settings):
    model_config = ConfigDict(extra="ignore")


@pytest.mark.parametrize(
    "wrong", [{"name": "two words"}, {"config_class": Drifting}, {"config_class": Lenient}], ids=str
)
def test_names_and_settings_are_checked(wrong: dict[str, Any]) -> None:
    assert fails(COMMON, "predictor", type("Wrong", (Right,), wrong))


def test_the_report_names_the_promise_and_keeps_the_exception() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="not this run")) as caught:
        check_predictor(LowRanks)
    [error] = caught.value.exceptions
    assert error.__notes__[0].startswith("updates_fit_the_run: Updates are finite")
    assert "predictor 'right' breaks 1 promises" in str(caught.value)


def test_an_expected_failure_is_accepted_unless_it_passes() -> None:
    check_predictor(LowRanks, expected_failures={"updates_fit_the_run": "it knows two ranks"})
    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="it holds a file")):
        check_predictor(Right, expected_failures={"pickles": "it holds a file"})


def test_an_expected_failure_names_a_check() -> None:
    with raises_kind("config-unknown-key", "updates_fit_runs", "updates_fit_the_run"):
        check_predictor(Right, expected_failures={"updates_fit_runs": "x"})


def test_each_plugin_and_check_is_a_test_with_a_readable_id() -> None:
    mark = parametrize_with_checks([Right, Right(space="factors")])
    assert len(mark.args[1]) == 2 * len(checks_of("predictor"))
    assert {"right-pickles", "right(space=factors)-pickles"} <= set(mark.kwargs["ids"])


@pytest.mark.parametrize("make", [lora_run, dense_run])
def test_a_synthetic_run_follows_from_its_seed_and_can_be_cut(make: Any) -> None:
    one, same, other = (make(seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not any(torch.equal(value, other[name]) for name, value in one.items() if value.any())
    whole = make()
    part = whole.only([step for step in whole.weights if step in (0, 10, 20)])
    assert part.steps == (10, 20)
    for parameter in part.parameters:
        assert torch.equal(*(dense(run.delta(parameter.name, 20, 10)) for run in (part, whole)))

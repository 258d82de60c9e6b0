"""A decorated function is a predictor like any other, and what it returns is checked."""

import math
import pickle
from typing import Any

import pytest
import torch
from pydantic import Field

from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.plugins import Registry
from next_core.predictor import Abstain, Outcome, PerMatrixPredictor, matrix_predictor
from next_core.settings import Settings
from next_core.types import Anchor
from tests.errors import raises_kind
from tests.predictors.trajectories import (
    EVERY_TEN,
    curved_lora_run,
    dense_run,
    drift,
    history,
    relative_error,
    resolve_dense,
    still,
)


class LastStepConfig(Settings):
    damping: float = Field(1.0, description="Factor on the motion")


@matrix_predictor("last-step", config=LastStepConfig, requires={"gram"})
def last_step(matrix: MatrixHistory, horizon: int, config: LastStepConfig) -> Outcome:
    """Continue the last interval."""
    if len(matrix.steps) < 2:
        return Abstain("needs two checkpoints")
    before, newest = matrix.steps[-2:]
    c = config.damping * horizon / (newest - before)
    return CoefficientUpdate({newest: c, before: -c})


def answering(*outcomes: Any, anchor: Anchor = "newest") -> Prediction:
    """The prediction of a predictor that returns these outcomes for the matrices a, b, ... of a run."""
    answers = dict(zip("abcdefg", outcomes, strict=False))

    @matrix_predictor("answers", anchor=anchor)
    def answers_of(matrix: MatrixHistory, horizon: int, config: Settings) -> Outcome:
        answer: Outcome = answers[matrix.name]
        return answer

    source = dense_run({name: drift(10 * i) for i, name in enumerate(answers)} | {"frozen": still()})
    return answers_of().fit(history(source)).predict(10)


def update(weight: float = 1.0) -> CoefficientUpdate:
    return CoefficientUpdate({100: weight})


def test_a_decorated_function_is_a_predictor_class() -> None:
    assert issubclass(last_step, PerMatrixPredictor)
    assert last_step.requires == frozenset({"gram"})
    assert last_step.__doc__ == "Continue the last interval."
    assert pickle.loads(pickle.dumps(last_step)) is last_step


def test_predicts_through_the_registry_with_its_own_settings() -> None:
    ours = Registry()
    ours.add(last_step)
    predictor = ours.make("predictor", "last-step", damping=0.5)
    prediction = predictor.fit(history(dense_run({"a": drift(1)}))).predict(40)
    assert (prediction.anchor, prediction.step, prediction.horizon) == ("newest", 100, 40)
    assert relative_error(resolve_dense(prediction, "a"), drift(1)(20)) < 1e-9


def test_refuses_an_anchor_that_is_not_one() -> None:
    with raises_kind("plugin-invalid", "oldest", "newest", "backbone"):
        matrix_predictor("x", anchor="oldest")


def test_takes_an_update_alone_or_with_its_confidence() -> None:
    lowrank = LowRankUpdate(LowRank(torch.ones(7, 1), torch.ones(1, 5)))
    prediction = answering(update(), (update(2.0), 0.25), lowrank, (lowrank, 1.0))
    assert prediction.updates == {"a": update(), "b": update(2.0), "c": lowrank, "d": lowrank}
    assert prediction.confidence == {"b": 0.25}
    assert prediction.weight("d") == 1.0


def test_keeps_each_abstention_beside_the_frozen_matrices() -> None:
    prediction = answering(Abstain("too noisy"), update())
    assert prediction.abstained == {"a": "too noisy", "frozen": "did not move since step 90"}
    assert set(prediction.updates) == {"b"}
    assert prediction.abstention is None


def test_abstains_as_a_whole_when_every_matrix_does() -> None:
    assert answering(Abstain("noisy"), Abstain("noisy")).abstention == "noisy"
    mixed = answering(Abstain("flat"), Abstain("noisy"), Abstain("noisy"))
    assert "noisy" in (mixed.abstention or "")
    assert mixed.abstained["a"] == "flat"


@pytest.mark.parametrize(
    "bad",
    [
        update(math.nan),
        update(math.inf),
        (update(), math.nan),
        LowRankUpdate(LowRank(torch.full((7, 1), math.nan), torch.ones(1, 5))),
        LowRankUpdate(LowRank(torch.ones(7, 1), torch.full((1, 5), math.inf))),
    ],
)
def test_an_update_that_is_not_finite_is_an_abstention_that_names_the_matrix(bad: Any) -> None:
    prediction = answering(update(), bad)
    assert "'b'" in prediction.abstained["b"]
    assert set(prediction.updates) == {"a"}


def test_names_the_matrix_whose_outcome_is_of_another_type() -> None:
    with raises_kind("predictor-wrong-answer", "'answers'", "NoneType", "'a'"):
        answering(None)


@pytest.mark.parametrize(
    ("anchor", "weights", "counts_from_step_0"),
    [
        ("newest", {100: 1.0, 90: -1.0}, False),
        ("newest", {100: 1.0}, True),
        ("backbone", {100: 2.0, 90: -1.0}, False),
        ("backbone", {100: 1.0, 90: -1.0}, True),
    ],
)
def test_factor_space_needs_step_0_unless_weights_cancel(
    anchor: Anchor, weights: dict[int, float], counts_from_step_0: bool
) -> None:
    @matrix_predictor("weighs", anchor=anchor)
    def weighs(matrix: MatrixHistory, horizon: int, config: Settings) -> Outcome:
        return CoefficientUpdate(weights, "factors")

    without, kept = (curved_lora_run(steps) for steps in (EVERY_TEN, (0, *EVERY_TEN)))
    assert bool(weighs().fit(history(kept)).predict(10).updates)
    assert bool(weighs().fit(history(without)).predict(10).updates) is not counts_from_step_0


def test_needs_a_history_and_a_horizon_that_is_ahead() -> None:
    with raises_kind("predictor-not-fitted", "last-step", "fit(history)"):
        last_step().predict(10)
    with raises_kind("config-invalid-value", "last-step", 0):
        last_step().fit(history(dense_run({"a": drift(1)}))).predict(0)


@pytest.mark.parametrize(("steps", "since"), [([80, 90], "step 80"), ([10], "the backbone")])
def test_abstains_when_training_changed_nothing(steps: list[int], since: str) -> None:
    prediction = last_step().fit(history(dense_run({"a": still()}, steps))).predict(10)
    assert since in (prediction.abstention or "")


def test_each_prediction_has_its_own_diagnostics() -> None:
    class Counting(PerMatrixPredictor):
        name = "counting"

        def prepare(self, horizon: int) -> Abstain | None:
            self.diagnostics[f"at_{horizon}"] = 1.0
            return None

        def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
            return update()

    predictor = Counting().fit(history(dense_run({"a": drift(1)})))
    first, second = predictor.predict(10), predictor.predict(20)
    assert (first.diagnostics, second.diagnostics) == ({"at_10": 1.0}, {"at_20": 1.0})

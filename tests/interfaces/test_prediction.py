"""A prediction becomes a move from the newest checkpoint: anchor, alpha and confidence are resolved once."""

import math

import pytest
import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.interfaces.prediction import jump_norms, resolve, weight_delta, weight_deltas
from next_core.interfaces.weight_delta import FactorStep, LazyDelta
from next_core.mathematics import low_rank
from next_core.mathematics.low_rank import LowRank
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors, Space
from tests.errors import raises_kind
from tests.predictors.trajectories import noise

STEPS = (0, 10, 20, 30)
NAMES = pytest.mark.parametrize("name", ["lora", "full"])


def factors(step: int) -> LoraFactors:
    return LoraFactors(noise(1, 2, 5) + 0.1 * step * noise(2, 2, 5), 0.1 * step * noise(3, 6, 2), scaling=2.0)


def moved(step: int) -> Tensor:
    """W_step - W_0, dense: of the LoRA matrix and of the full one alike."""
    return factors(step).scaling * factors(step).B @ factors(step).A


@pytest.fixture
def source() -> MemorySource:
    backbone = noise(9, 6, 5)
    checkpoints = {step: {"lora": factors(step), "full": backbone + moved(step)} for step in STEPS}
    return MemorySource(checkpoints, {"full": backbone})


def predict(source: MemorySource, update: Update, anchor: str = "newest", **options: float) -> Prediction:
    updates = {"lora": update, "full": update}
    confidence = {name: options["confidence"] for name in updates if "confidence" in options}
    return Prediction(source, 30, 10, anchor, updates, confidence)


def dense(prediction: Prediction, name: str, alpha: float = 1.0) -> Tensor:
    return low_rank.dense(prediction.delta(name, alpha))


@NAMES
def test_coefficients_from_the_newest_checkpoint_are_a_sum_of_deltas(source: MemorySource, name: str) -> None:
    prediction = predict(source, CoefficientUpdate({30: 1.5, 10: -0.5}), confidence=0.5)
    torch.testing.assert_close(dense(prediction, name, 3.0), 1.5 * (1.5 * moved(30) - 0.5 * moved(10)))


@NAMES
def test_a_cumulative_prediction_is_not_added_to_what_was_trained_already(source: MemorySource, name: str) -> None:
    coefficients = predict(source, CoefficientUpdate({30: 1.25}), "backbone")
    torch.testing.assert_close(dense(coefficients, name, 2.0), 2.0 * 0.25 * moved(30))
    target = LowRank(noise(4, 6, 1), noise(5, 1, 5))
    low_rank = predict(source, LowRankUpdate(target), "backbone")
    torch.testing.assert_close(dense(low_rank, name, 2.0), 2.0 * (target.dense() - moved(30)))


@NAMES
def test_a_low_rank_update_from_the_newest_checkpoint_is_itself(source: MemorySource, name: str) -> None:
    jump = LowRank(noise(4, 6, 1), noise(5, 1, 5))
    torch.testing.assert_close(dense(predict(source, LowRankUpdate(jump)), name, 2.0), 2.0 * jump.dense())


@pytest.mark.parametrize("anchor", ["newest", "backbone"])
def test_in_factor_space_a_and_b_move_each_by_the_same_sum(source: MemorySource, anchor: str) -> None:
    weights = {30: 2.0, 20: -1.5} if anchor == "newest" else {30: 3.0, 20: -1.5}
    step = weight_delta(predict(source, CoefficientUpdate(weights, "factors"), anchor), "lora", 2.0)
    # 2 (2 x_30 - 1.5 x_20 - 0.5 x_0): step 0 takes what is missing to zero.
    A, B = (
        4 * x30 - 3 * x20 - x0
        for x30, x20, x0 in zip(*((factors(t).A, factors(t).B) for t in (30, 20, 0)), strict=True)
    )
    torch.testing.assert_close(step.dA, A)
    torch.testing.assert_close(step.dB, B)
    after = 2.0 * (factors(30).B + B) @ (factors(30).A + A)
    torch.testing.assert_close(step.merged().dense(), after - moved(30))


def test_in_factor_space_weights_that_sum_to_zero_need_no_step_0() -> None:
    source = MemorySource({step: {"lora": factors(step)} for step in (10, 20, 30)})
    prediction = Prediction(source, 30, 10, updates={"lora": CoefficientUpdate({30: 1.0, 20: -1.0}, "factors")})
    assert isinstance(weight_delta(prediction, "lora", 1.0), FactorStep)
    missing = Prediction(source, 30, 10, updates={"lora": CoefficientUpdate({30: 1.0}, "factors")})
    with pytest.raises(CheckpointError, match="step 0"):
        weight_delta(missing, "lora", 1.0)


def test_without_factors_factor_space_is_merged_space(source: MemorySource) -> None:
    update = CoefficientUpdate({30: 1.0, 20: -1.0}, "factors")
    torch.testing.assert_close(dense(predict(source, update), "full"), moved(30) - moved(20))


@pytest.mark.parametrize("space", ["merged", "factors"])
@pytest.mark.parametrize(
    ("weights", "anchor"), [({30: 1.0}, "backbone"), ({}, "newest"), ({20: 0.0}, "newest"), ({0: 1.0}, "newest")]
)
@NAMES
def test_a_prediction_of_where_the_weights_are_moves_nothing(
    source: MemorySource, space: Space, weights: dict[int, float], anchor: str, name: str
) -> None:
    prediction = predict(source, CoefficientUpdate(weights, space), anchor)
    assert not dense(prediction, name).any()
    assert jump_norms(prediction, 1.0).get(name, 0.0) == 0.0


def test_what_is_not_predicted_or_not_trusted_does_not_move(source: MemorySource) -> None:
    update = CoefficientUpdate({30: 1.0})
    prediction = Prediction(source, 30, 10, updates={"lora": update, "full": update}, confidence={"lora": 0.0})
    assert weight_delta(prediction, "other", 1.0) is None
    assert weight_delta(prediction, "lora", 1.0) is None
    assert [name for name, _ in weight_deltas(prediction, 1.0)] == ["full"]


def test_the_norm_of_a_jump_is_that_of_the_dense_move(source: MemorySource) -> None:
    for lora in (
        CoefficientUpdate({30: 1.0, 20: -1.0}, "factors"),
        LowRankUpdate(LowRank(noise(6, 6, 2), noise(7, 2, 5))),
    ):
        updates: dict[str, Update] = {"lora": lora, "full": CoefficientUpdate({30: 1.0, 20: -1.0})}
        prediction = Prediction(source, 30, 10, updates=updates)
        found = jump_norms(prediction, 1.5)
        assert found == {name: pytest.approx(float(dense(prediction, name, 1.5).norm()), rel=1e-9) for name in updates}


def test_a_combination_of_many_checkpoints_is_no_wider_than_the_matrix(source: MemorySource) -> None:
    found = weight_delta(predict(source, CoefficientUpdate({10: 1.0, 20: -2.0, 30: 1.5})), "lora", 1.0)
    assert found.rank <= 5
    torch.testing.assert_close(found.dense(), moved(10) - 2 * moved(20) + 1.5 * moved(30))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@NAMES
def test_a_move_that_is_not_finite_is_refused(source: MemorySource, name: str, bad: float) -> None:
    good = CoefficientUpdate({30: 1.0})
    for prediction in (
        predict(source, CoefficientUpdate({30: bad, 20: -1.0})),
        predict(source, CoefficientUpdate({30: bad, 20: -1.0}, "factors")),
        predict(source, LowRankUpdate(LowRank(torch.full((6, 1), bad), torch.ones(1, 5)))),
        predict(source, good, confidence=bad),
    ):
        with raises_kind("numbers-not-finite", f"'{name}'", "step 30"):
            weight_delta(prediction, name, 1.0)
    with raises_kind("numbers-not-finite", f"'{name}'"):
        resolve(predict(source, good), name, bad)


def test_an_update_of_another_shape_or_parameter_or_step_is_refused_by_name(source: MemorySource) -> None:
    update = LowRankUpdate(LowRank(noise(1, 5, 1), noise(2, 1, 6)))
    with raises_kind("predictor-wrong-answer", "'lora'", "(5, 6)", "(6, 5)"):
        weight_delta(predict(source, update), "lora", 1.0)
    for other in (update, CoefficientUpdate({30: 1.0})):
        with raises_kind("predictor-wrong-answer", "'other'"):
            weight_delta(Prediction(source, 30, 10, updates={"other": other}), "other", 1.0)
    for step in (25, "20"):
        with raises_kind("predictor-wrong-answer", "'lora'", repr(step)):
            weight_delta(predict(source, CoefficientUpdate({step: 1.0})), "lora", 1.0)
    with raises_kind("predictor-wrong-answer", "'lora'", "-0.5"):
        weight_delta(predict(source, CoefficientUpdate({30: 1.0}), confidence=-0.5), "lora", 1.0)
    for wrong in (([0.5], "merged"), ({30: 1.0}, "factor")):
        with raises_kind("predictor-wrong-answer", "factors"):
            CoefficientUpdate(*wrong)


class RowSource(MemorySource):
    """A dense run whose rows can be read alone."""

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        delta = self.delta(name, step, None if since == 0 else since)
        return delta[rows]


@pytest.mark.parametrize("anchor", ["newest", "backbone"])
@pytest.mark.parametrize(
    "update",
    [
        CoefficientUpdate({30: 1.5, 10: -0.5}),
        CoefficientUpdate({30: 1.0, 20: -1.0}, "factors"),
        CoefficientUpdate({20: 1.0, 0: -2.0}),
        LowRankUpdate(LowRank(noise(4, 6, 1), noise(5, 1, 5))),
    ],
)
def test_a_move_by_rows_is_the_same(
    source: MemorySource, update: Update, anchor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("next_core.interfaces.weight_delta.BLOCK", 10)
    backbone = noise(9, 6, 5)
    by_rows = RowSource({step: {"full": backbone + moved(step)} for step in STEPS}, {"full": backbone})
    streamed = Prediction(by_rows, 30, 10, anchor, {"full": update}, {"full": 0.5})
    expected = dense(predict(source, update, anchor, confidence=0.5), "full", 2.0)
    lazy = not isinstance(update, LowRankUpdate) or anchor == "backbone"
    found = resolve(streamed, "full", 2.0)
    assert isinstance(found, LazyDelta if lazy else LowRank)
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(dense(streamed, "full", 2.0), expected)
    assert jump_norms(streamed, 2.0)["full"] == pytest.approx(float(expected.norm()))

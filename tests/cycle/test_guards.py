"""The size of a jump beside what RL did lately, before the jump is made."""

import math

import pytest
from torch import Tensor

from next_core.cycle.jump import jump_norm, recent_motion
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from tests.predictors.trajectories import noise


def weights(seed: int, step: float) -> LoraFactors:
    return LoraFactors(A=noise(seed, 2, 5) + step * noise(seed + 1, 2, 5), B=step * noise(seed + 2, 6, 2), scaling=2.0)


def dense(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.B @ factors.A


@pytest.fixture
def source() -> MemorySource:
    return MemorySource({step: {"a": weights(1, step), "b": weights(10, step)} for step in (5, 10, 15, 20)})


def motion(step: int, since: int | None) -> float:
    """||W_step - W_since||_F over both matrices, from dense ones."""
    moved = [dense(weights(seed, step)) - (0 if since is None else dense(weights(seed, since))) for seed in (1, 10)]
    return math.sqrt(sum(float(matrix.norm()) ** 2 for matrix in moved))


@pytest.mark.parametrize(
    ("window", "since"), [(5, 15), (10, 10), (15, 5), (7, 10), (16, None), (20, None), (100, None)]
)
def test_recent_motion_is_that_of_the_last_steps(source: MemorySource, window: int, since: int | None) -> None:
    assert recent_motion(History(source), window) == pytest.approx(motion(20, since), rel=1e-9)


def test_the_norm_of_a_jump_is_that_of_the_matrices_it_moves(source: MemorySource) -> None:
    update = LowRankUpdate(LowRank(noise(3, 6, 1), noise(4, 1, 5)))
    secant = CoefficientUpdate({20: 1.0, 15: -1.0})
    prediction = Prediction(source, 20, 5, updates={"a": update, "b": secant}, confidence={"a": 0.5})
    norm, ratio = jump_norm(prediction, 3.0, History(source))
    a = 1.5 * float(update.matrix.dense().norm())
    b = 3.0 * float((dense(weights(10, 20)) - dense(weights(10, 15))).norm())
    assert norm == pytest.approx(math.hypot(a, b), rel=1e-9)
    assert ratio == pytest.approx(math.hypot(a, b) / motion(20, 15), rel=1e-9)


def test_a_motion_of_much_less_than_one_is_measured_as_it_is() -> None:
    slow = MemorySource({step: {"a": weights(1, step / 1e6)} for step in (5, 10)})
    moved = dense(weights(1, 10 / 1e6)) - dense(weights(1, 5 / 1e6))
    assert recent_motion(History(slow), 5) == pytest.approx(float(moved.norm()), rel=1e-6)


def test_a_jump_out_of_nothing_is_infinitely_large_and_no_jump_is_none() -> None:
    still = MemorySource({5: {"a": weights(1, 5)}, 10: {"a": weights(1, 5)}})
    moved = Prediction(still, 10, 5, updates={"a": LowRankUpdate(LowRank(noise(3, 6, 1), noise(4, 1, 5)))})
    assert jump_norm(moved, 1.0, History(still))[1] == math.inf
    assert jump_norm(Prediction(still, 10, 5, updates={}), 1.0, History(still)) == (0.0, 0.0)

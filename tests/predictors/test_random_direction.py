"""A random direction: a seeded low-rank jump as long as the run's last motion."""

import functools

import pytest
import torch

from next_core.interfaces import Prediction
from next_core.mathematics.low_rank import LowRank, dense
from next_core.sources.memory import MemorySource
from tests.predictors.trajectories import curve, curved_lora_run, dense_run, predicted_by

predict = functools.partial(predicted_by, "random")


def matrix(prediction: Prediction, name: str) -> LowRank:
    update = prediction.updates[name]
    return update.matrix


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_is_as_long_as_the_motion_of_the_last_horizon(lora: bool, rank: int) -> None:
    source = curved_lora_run() if lora else dense_run({"a": curve(1), "b": curve(30)})
    found = predict(source, rank=rank)
    assert found.anchor == "newest"
    for name in ("a", "b"):
        moved = dense(source.delta(name, 100, 70))
        assert float(matrix(found, name).dense().norm()) == pytest.approx(float(moved.norm()), rel=1e-9)
        assert int(torch.linalg.matrix_rank(matrix(found, name).dense())) == min(rank, 5)


def test_a_horizon_as_long_as_the_run_counts_from_where_rl_began() -> None:
    source = dense_run({"a": curve(1)})
    wanted = float(dense(source.delta("a", 100)).norm())
    assert float(matrix(predict(source, 100), "a").dense().norm()) == pytest.approx(wanted)


def test_seed_step_and_name_decide_the_direction_and_nothing_else() -> None:
    both, one = dense_run({"a": curve(1), "b": curve(1)}), dense_run({"b": curve(1)})
    first = predict(both)
    torch.testing.assert_close(matrix(first, "b").dense(), matrix(predict(one), "b").dense(), rtol=1e-9, atol=0)
    assert torch.equal(matrix(first, "b").left, matrix(predict(both), "b").left)

    def cosine(other: LowRank) -> float:
        ours = matrix(first, "b").dense()
        return float((ours * other.dense()).sum() / ours.norm() / other.dense().norm())

    earlier = MemorySource({t: both._checkpoints[t] for t in both.steps if t < 100}, both._backbone)
    for other in (matrix(first, "a"), matrix(predict(both, seed=1), "b"), matrix(predict(earlier), "b")):
        assert abs(cosine(other)) < 0.9


def test_does_not_move_a_matrix_that_returned_to_where_it_was() -> None:
    there_and_back = {t: curve(1)(10) * (1.0 if t % 20 else 0.0) for t in range(0, 110, 10)}
    found = predict(dense_run({"a": lambda t: there_and_back[t]}), 20)
    assert set(found.abstained) == {"a"}
    assert not found.updates

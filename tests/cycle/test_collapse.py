"""When a reward counts as collapsed: given its sampling error, its best mean so far, and how much was lost."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from next_core.backend import LoggedReward
from next_core.cycle.collapse import RewardHistory, RewardTrend


def rewards(
    probabilities: list[float], roll_outs: int = 64, every: int = 1, seed: int = 0, together: int = 1
) -> list[LoggedReward]:
    """Logged means of binary rewards that succeed with these probabilities, one a step, ``together`` at a time."""
    generator, found = random.Random(seed), []
    for end in range(every, len(probabilities) + 1, every):
        of = probabilities[end - every : end]
        drawn = [float(generator.random() < p) for p in of for _ in range(roll_outs // together)] * together
        mean = sum(drawn) / len(drawn)
        found.append(LoggedReward(end, every, mean, math.sqrt(mean * (1 - mean) / len(drawn))))
    return found


def first_collapse(logged: list[LoggedReward]) -> int | None:
    history = RewardHistory()
    for record in logged:
        history.add(record)
        if any(trend.collapsed for trend in history.trends()):
            return record.step
    return None


def reward_trends(logged: list[LoggedReward], abandoned: Sequence[tuple[int, int]] = ()) -> list[RewardTrend]:
    history = RewardHistory(abandoned)
    for record in logged:
        history.add(record)
    return history.trends()


@pytest.mark.parametrize(("p", "every"), [(0.05, 1), (0.2, 1), (0.2, 5), (0.5, 1), (0.9, 10)])
def test_a_steady_or_rising_reward_never_counts_as_collapsed(p: float, every: int) -> None:
    for seed in range(20):
        assert first_collapse(rewards([p] * 200, every=every, seed=seed)) is None
        assert first_collapse(rewards([p + (0.95 - p) * t / 200 for t in range(200)], every=every, seed=seed)) is None


@pytest.mark.parametrize(("p", "every", "within"), [(0.2, 1, 8), (0.2, 5, 5), (0.5, 1, 5), (0.8, 5, 5)])
def test_a_fall_to_zero_is_seen_within_a_few_steps(p: float, every: int, within: int) -> None:
    for seed in range(20):
        seen = first_collapse(rewards([p] * 30 + [0.0] * 30, every=every, seed=seed))
        assert 30 < seen <= 30 + within


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.8])
def test_rollouts_of_a_prompt_that_succeed_together_vary_more_and_do_not_count_as_collapsed(p: float) -> None:
    wrong = [first_collapse(rewards([p] * 300, 128, seed=seed, together=4)) for seed in range(20)]
    assert sum(step is not None for step in wrong) <= 1
    for seed in range(10):
        assert 60 < first_collapse(rewards([p] * 60 + [0.0] * 60, 128, seed=seed, together=4)) <= 60 + 12


def test_a_fall_in_the_first_steps_is_seen() -> None:
    seen = first_collapse(rewards([0.2, 0.2, 0.1, 0.05, *[0.0] * 20]))
    assert seen <= 8


def test_a_rare_reward_that_is_lost_in_the_first_steps_is_missed() -> None:
    for seed in range(20):
        assert first_collapse(rewards([0.05] * 2 + [0.0] * 40, 128, seed=seed)) <= 2 + 30


@pytest.mark.parametrize(("at", "low"), [(1, 0.004), (2, 0.004), (1, 0.01), (5, 0.01)])
def test_a_sudden_fall_that_leaves_a_rare_success_is_not_taken_for_noise(at: int, low: float) -> None:
    seen = [first_collapse(rewards([0.22] * at + [low] * 60, 256, seed=seed)) for seed in range(20)]
    assert sum(step is None or step > at + 20 for step in seen) <= 1


@pytest.mark.parametrize("p", [0.0005, 0.002, 0.01])
def test_a_reward_that_stays_rare_is_not_missed(p: float) -> None:
    wrong = [first_collapse(rewards([p] * 300, 128, seed=seed)) for seed in range(20)]
    assert sum(step is not None for step in wrong) <= 1


def test_a_third_of_the_reward_is_a_collapse_and_a_tenth_is_not() -> None:
    assert first_collapse(rewards([0.6] * 30 + [0.35] * 40)) is not None
    assert first_collapse(rewards([0.6] * 30 + [0.54] * 40)) is None


def test_after_a_return_recent_rewards_are_new_ones() -> None:
    logged, back = rewards([0.5] * 20 + [0.0] * 5), [(18, 25)]
    assert not reward_trends(logged, back)
    assert len(reward_trends([*logged, LoggedReward(30, 5, 0.5, 0.03)], back)) == 1


def test_what_an_abandoned_path_earned_is_not_asked_of_the_weights_that_were_returned_to() -> None:
    logged = rewards([0.1] * 11 + [0.3] * 19 + [0.1] * 60)
    returned = [record for record in logged if record.step == 1 or record.step > 30]
    assert any(trend.collapsed for trend in reward_trends(logged))
    for count in range(31, len(logged) + 1):
        assert not any(trend.collapsed for trend in reward_trends(logged[:count], [(10, 30)]))
        assert reward_trends(logged[:count], [(0, 30)]) == reward_trends(returned[: count - 29])


def test_steps_that_an_abandoned_path_took_do_not_make_rewards_surer() -> None:
    kept = rewards([0.5] * 40 + [0.98] * 15 + [0.9] * 36)
    later = [replace(record, step=record.step + 100) for record in kept[1:]]
    errors = [[trend.error for trend in reward_trends(records)] for records in (kept, [kept[0], *later])]
    assert errors[0] == errors[1]


def test_rewards_of_any_scale_and_sign_are_judged_by_their_own_spread() -> None:
    steady = [LoggedReward(t, 1, -2.0 + 0.05 * (t % 2), 0.1) for t in range(1, 30)]
    assert first_collapse(steady) is None
    assert first_collapse([*steady, *(LoggedReward(t, 1, -3.5, 0.1) for t in range(30, 40))]) is not None

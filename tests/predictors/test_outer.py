"""expo, re-grounding, snoo and ema-pull against the formulas of their papers, by hand or simulated with all state."""

from typing import Any

import pytest

from next_core.plugins import make_predictor
from next_core.sources.memory import MemorySource
from tests.predictors.test_secant import weights
from tests.predictors.trajectories import curve, dense_run, drift, history, linear_lora_run, noise, resolve_dense


def predicted(name: str, source: MemorySource, horizon: int, jumps: Any = (), **fields: Any) -> dict[int, float]:
    past = history(source)
    past.jump_log = jumps
    return weights(make_predictor(name, **fields).fit(past).predict(horizon))


def test_expo_moves_by_half_of_the_motion_since_the_backbone() -> None:
    source = dense_run({"a": curve(1)})
    moved = resolve_dense(make_predictor("expo").fit(history(source)).predict(7), "a")
    assert (moved - 0.5 * source.delta("a", 100)).norm() < 1e-12
    assert predicted("expo", source, 7, share=0.3) == {100: 1.3}


def test_re_grounding_counts_each_step_of_a_segment_six_times() -> None:
    source = dense_run({"a": drift(1)}, [20, 40])
    schedule = make_predictor("re-grounding").recommended["schedule"]
    assert predicted("re-grounding", source, schedule["horizon"]) == {40: 5.0, 20: -5.0}
    moved = resolve_dense(make_predictor("re-grounding").fit(history(source)).predict(100), "a")
    assert (moved - drift(1)(100)).norm() < 1e-9


def test_snoo_weighs_the_motions_of_its_rounds() -> None:
    # eta .8, mu .5: (.8 - 1) + .8 * .5 = .2 of the last motion, .8 * .25 of the one before, .8 * .125 of the first.
    source = dense_run({"a": drift(1)}, [20, 40, 60])
    found = predicted("snoo", source, 20, mu=0.5)
    assert found == pytest.approx({60: 0.2, 40: 0.2 - 0.2, 20: 0.1 - 0.2, 0: -0.1})
    lookahead = predicted("snoo", source, 20, mu=0, eta=0.5)
    assert lookahead == pytest.approx({60: -0.5, 40: 0.5, 20: 0.0, 0: 0.0})


def test_snoo_abstains_without_a_round_of_k_steps() -> None:
    prediction = make_predictor("snoo").fit(history(dense_run({"a": drift(1)}, [30]))).predict(20)
    assert "20 steps before step 30" in (prediction.abstention or "")
    assert predicted("snoo", dense_run({"a": drift(1)}, [30, 50]), 20) == pytest.approx({50: 0.4, 30: -0.4})


MOTIONS = noise(5, 12).tolist()  # What RL moved one weight by before each checkpoint


def snoo_jumps(eta: float, mu: float) -> list[float]:
    """Every outer step, by the optimizer's own state."""
    slow, momentum, made = 0.0, 0.0, []
    for motion in MOTIONS:
        fast = slow + motion
        momentum = mu * momentum + motion
        slow += eta * (motion + mu * momentum)
        made.append(slow - fast)
    return made


def pace_jumps(steps: list[int], c: float, kappa: float, refused: set[int]) -> list[float]:
    """Every pull, by the average and the weight themselves."""
    weight, average, made = 0.0, 0.0, []
    for step, motion in zip(steps, MOTIONS, strict=True):
        weight += motion
        rate = (1 + step) ** -kappa
        made.append(c * rate * (average - weight))
        weight += 0.0 if step in refused else made[-1]
        average += rate * (weight - average)
    return made


@pytest.mark.parametrize("name", ["snoo", "ema-pull"])
def test_what_the_checkpoints_give_is_what_the_state_would_give(name: str) -> None:
    every = 5
    steps = [every * (index + 1) for index in range(len(MOTIONS))]
    refused = {20, 25} if name == "ema-pull" else set()
    settings = {"eta": 0.8, "mu": 0.75} if name == "snoo" else {"strength": 0.3, "kappa": 0.5}
    wanted = snoo_jumps(**settings) if name == "snoo" else pace_jumps(steps, 0.3, 0.5, refused)
    trained = {0: 0.0}
    for step, motion in zip(steps, MOTIONS, strict=True):
        trained[step] = trained[step - every] + motion  # checkpoints hold the motion of RL alone
    for count in range(1, len(steps) + 1):
        seen = steps[:count]
        jumps = [{"step": step, "accepted": step not in refused, "alpha": 1.0} for step in seen[:-1]]
        found = predicted(name, linear_lora_run([0, *seen]), every, jumps, **settings)
        jump = sum(weight * trained[step] for step, weight in found.items())
        assert jump == pytest.approx(wanted[count - 1], rel=1e-9)
        assert sum(found.values()) == pytest.approx(0.0, abs=1e-12)


def test_ema_pull_reads_no_checkpoint_that_hardly_counts() -> None:
    steps = list(range(5, 505, 5))
    read = predicted("ema-pull", linear_lora_run([0, *steps]), 5)
    assert set(read) == set(steps[-len(read) :])
    assert 50 < len(read) < 100

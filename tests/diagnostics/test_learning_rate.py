"""The advice on the learning rate: what it says of runs whose agreement is known, and when it says nothing."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core.diagnostics import LearningRate, analyze, learning_rate_factor, run_advice
from next_core.diagnostics.learning_rate import MOST_MOMENTS, learning_rate_advice, measure_agreements
from next_core.errors import CheckpointError
from next_core.history.history import History
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from tests.diagnostics.runs import FIFTEEN, lora_walks, name, straight, walks
from tests.predictors.trajectories import dense_run, drift, linear_lora_run, noise

TWENTIES = tuple(range(0, 420, 20))
FIVES = tuple(range(0, 255, 5))
MOST = pytest.approx(46.34, abs=0.01)


def mixture(share: float, count: int, seed: int, *shape: int) -> Tensor:
    """A path each step of which repeats ``share`` of the one before, and is as long: (count, *shape)."""
    steps = [noise(seed, *shape)]
    for index in range(1, count - 1):
        steps.append(share * steps[-1] + math.sqrt(1 - share**2) * noise(seed + index, *shape))
    return torch.cat([torch.zeros(1, *shape, dtype=torch.float64), torch.stack(steps)]).cumsum(0)


def lora_mixture(share: float, steps: Sequence[int] = TWENTIES) -> MemorySource:
    """Three matrices whose factors both move so."""
    paths = [
        (
            noise(seed, 4, 20) + mixture(share, len(steps), seed + 100, 4, 20),
            mixture(share, len(steps), seed + 200, 24, 4),
        )
        for seed in (0, 1000, 2000)
    ]
    return MemorySource(
        {
            step: {name(i): LoraFactors(A[t], B[t], 2.0) for i, (A, B) in enumerate(paths)}
            for t, step in enumerate(steps)
        }
    )


def full_mixture(share: float, steps: Sequence[int] = TWENTIES) -> MemorySource:
    paths = {name(i): mixture(share, len(steps), 1000 * i, 20, 15) for i in range(3)}
    return MemorySource(
        {step: {key: path[t] for key, path in paths.items()} for t, step in enumerate(steps) if step},
        {key: torch.zeros(20, 15, dtype=torch.float64) for key in paths},
    )


def told(source: MemorySource, jumps: Sequence[dict[str, Any]] = ()) -> LearningRate:
    return learning_rate_factor(History(source), jumps)


def tried(multiple: float, accepted: bool = True) -> dict[str, Any]:
    return {"step": 20, "accepted": accepted, "diagnostics": {"multiple": multiple, "measured": 20.0}}


@pytest.mark.parametrize("source", [straight(FIVES[1:]), linear_lora_run(FIVES)], ids=["dense", "lora"])
def test_a_straight_path_has_the_largest_factor(source: MemorySource) -> None:
    rate = told(source)
    assert rate.agreement == pytest.approx(1.0)
    assert (rate.factor, rate.low, rate.high) == (MOST, MOST, MOST)
    assert (rate.span, rate.moments, rate.reason) == (20, 22, None)
    said = str(learning_rate_advice(rate))
    assert "at least 46 times too small (17 or more)" in said
    assert "20-step updates have agreement 1.00 (random walk" in said


@pytest.mark.parametrize("source", [walks(8), lora_walks(8)], ids=["dense", "lora"])
def test_a_random_walk_gets_no_advice(source: MemorySource) -> None:
    rate = told(source)
    assert abs(rate.agreement) < 0.1
    assert rate.factor == pytest.approx(1.0)
    assert learning_rate_advice(rate) is None
    assert not any("learning rate" in sentence for sentence in analyze(History(source), draws=20).advice)


def test_agreement_that_a_walk_can_have_by_chance_is_no_sign() -> None:
    """In two dimensions a walk repeats most of its last step every so often."""
    turns = torch.tensor([0.0, 0.9, 1.8])
    path = torch.stack([turns.cos(), turns.sin()], -1)[:, :, None].double().cumsum(0)
    rate = told(dense_run({"a": lambda t: path[t // 10 - 1] if t else torch.zeros(2, 1).double()}, (10, 20, 30)))
    assert rate.agreement == pytest.approx(math.cos(0.9))
    assert math.cos(0.9) < rate.null.high
    assert (rate.factor, rate.low, rate.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("make", [lora_mixture, full_mixture])
@pytest.mark.parametrize(("share", "factor"), [(0.85, 11.9), (0.5, 4.0), (0.12, 1.1)])
def test_a_known_mixture_has_its_agreement_and_factor(make: Any, share: float, factor: float) -> None:
    rate = told(make(share))
    assert rate.agreement == pytest.approx(share, abs=0.06)
    assert rate.factor == pytest.approx(factor, rel=0.35)
    assert 1.0 <= rate.low <= rate.factor <= rate.high
    assert (learning_rate_advice(rate) is None) == (factor < 2)


@pytest.mark.parametrize(
    "source",
    [
        dense_run({"a": drift(1)}, (10,)),
        dense_run({"a": drift(1)}, (10, 25)),
        linear_lora_run((10, 20)),  # where its step 0 was not kept
    ],
    ids=["one", "uneven", "lora"],
)
def test_too_few_checkpoints_are_the_reason(source: MemorySource) -> None:
    rate = told(source)
    assert rate.factor is None
    assert rate.reason is not None
    assert learning_rate_advice(rate) is None
    assert analyze(History(source), draws=20).missing["agreement"] == rate.reason


def test_a_run_that_does_not_move_is_the_reason() -> None:
    still = dense_run({"a": lambda t: min(t, 50) * drift(1)(1)}, FIFTEEN)
    assert "no matrix moved over the last interval" in str(told(still).reason)
    begins = dense_run({"a": lambda t: max(t - 140, 0) * drift(1)(1)}, FIFTEEN)
    assert told(begins).reason == "no matrix moved between the moments compared"


def test_moments_are_half_a_span_apart_up_to_the_newest_and_not_too_many() -> None:
    found = measure_agreements(History(dense_run({"a": drift(1)}, range(2, 252, 2))), 20, 0)
    assert found.moments == tuple(range(40, 251, 10))
    long = measure_agreements(History(dense_run({"a": drift(1)}, range(10, 2010, 10))), 20, 0)
    assert len(long.moments) == MOST_MOMENTS
    assert (long.moments[0], long.moments[-1]) == (40, 2000)


def test_the_multiples_of_auto_are_in_the_factor() -> None:
    alone, jumps = told(lora_mixture(0.5)), [tried(5.0), tried(7.0), tried(9.0)]
    rate = told(lora_mixture(0.5), jumps)
    assert (rate.multiple, rate.jumps) == (7.0, 3)
    for mine, without in ((rate.factor, alone.factor), (rate.low, alone.low), (rate.high, alone.high)):
        assert mine == pytest.approx(7 * without)
    others = {"step": 50, "accepted": True, "diagnostics": {"median_lambda": 0.7}}
    assert "jumps excluded" in str(run_advice(lora_mixture(0.85), [others]))
    said = str(run_advice(lora_walks(20), jumps))
    assert "7 times too small (2.6 to 19)" in said
    assert "adaptive-secant multiplied its steps by 7.0" in said
    refused = told(lora_walks(20), [tried(5.0), tried(9.0, accepted=False), tried(1.0, accepted=False)])
    assert (refused.multiple, refused.jumps, refused.factor) == (1.0, 1, pytest.approx(1.0))


def advised(**changes: Any) -> str:
    rate = LearningRate(agreement=0.85, factor=12.0, low=8.0, high=20.0, span=20, moments=9, steps=250)
    return str(learning_rate_advice(dataclasses.replace(rate, **changes)))


def test_the_advice_names_the_rate_to_use_and_what_makes_it_less_certain() -> None:
    assert advised(logged=(1e-4, 1e-4)).startswith("Raise learning_rate from 0.0001 to about 0.001, in steps.")
    assert "about 12 times too small (3 to 54)" in advised(quartiles=(0.8, 0.9))
    assert "about 12 times too small (3 or more)" in advised(quartiles=(0.8, 0.99)), "its end is capped"
    assert "Note" not in advised(logged=(1e-4, 1e-4))
    assert "120 steps reads high" in advised(steps=120)
    assert "only one comparison" in advised(moments=1)
    assert "the rate changed during the run" in advised(logged=(1e-5, 1e-4))


def test_the_rates_that_the_trainer_logged_are_read() -> None:
    source = lora_mixture(0.85)
    assert told(source).logged is None
    source._metrics = {20: {"learning_rate": 2e-4}, 40: {"learning_rate": 1e-4}, 60: {"reward": 1.0}}
    assert told(source).logged == (1e-4, 2e-4)


def test_an_analysis_has_the_figure_its_series_the_factor_and_the_sentence() -> None:
    history = History(lora_mixture(0.85))
    history.jump_log = [tried(3.0)]
    analysis = analyze(history)
    figure, rate = analysis.overall.figures["agreement"], analysis.learning_rate
    assert figure.outside == "above"
    assert rate.agreement is not None
    assert figure.value == pytest.approx(rate.agreement, abs=0.05)
    series = analysis.overall.series["agreement"]
    assert (series.over, series.x) == ("step", TWENTIES[2:])
    assert series.null is not None
    assert rate.multiple == 3.0
    assert any("learning rate" in sentence for sentence in analysis.advice)
    assert analysis.as_dict()["learning_rate"].keys() >= {"factor", "low", "high", "agreement", "span", "reason"}


def test_a_run_whose_start_cannot_be_read_is_named() -> None:
    lost = MemorySource(dense_run({"a": drift(1)}, (10, 20))._checkpoints)
    with pytest.raises(CheckpointError):
        told(lost)
    assert run_advice(lost, []) is None  # reading whole matrices would take long

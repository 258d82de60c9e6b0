"""The agreement of successive motions: which span is compared, and where its inner products come from."""

import math

import pytest
import torch

from next_core.history.history import History, motion_grams
from next_core.mathematics.agreement import agreement, comparable_span
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from tests.predictors.trajectories import curved_lora_run, dense_run, noise, walk


@pytest.mark.parametrize(
    ("steps", "span"),
    [
        (range(0, 205, 5), 20),
        (range(0, 105, 7), 14),
        (range(0, 100, 15), 15),
        (range(0, 200, 50), 50),
        (range(0, 35, 10), 10),
        ((0, 3, 6, 40, 80), 3),
        ((10, 20), None),
        ((0, 10, 25), None),
    ],
)
def test_the_span_is_the_longest_up_to_20_steps_or_the_shortest_beyond(steps: list[int], span: int | None) -> None:
    assert comparable_span(steps, list(steps)) == span


def test_only_motions_that_end_where_they_are_asked_to_count() -> None:
    steps = (0, 3, 6, 40, 80)
    assert comparable_span(steps, steps[-1:]) == 40
    assert comparable_span(steps, steps[-1:], most=60) == 40
    assert comparable_span(steps, [40]) is None


def test_inner_products_are_those_of_the_factors_of_a_lora_run() -> None:
    source = curved_lora_run()
    points = (0, 20, 50, 100)
    found = motion_grams(History(source), points)
    assert set(found) == {"a", "b"}
    at = [source.factors("a", point) for point in points]
    flat = [torch.cat([one.A.flatten(), one.B.flatten()]) for one in at if isinstance(one, LoraFactors)]
    moved = torch.stack(flat).diff(dim=0)
    torch.testing.assert_close(found["a"], moved @ moved.T)


def test_without_lora_they_are_those_of_the_deltas_and_the_first_point_may_be_the_start() -> None:
    source = dense_run({"a": walk(1)})
    for points in ((0, 20, 50, 100), (10, 20, 50, 100)):
        moved = torch.stack([walk(1)(point) for point in points]).diff(dim=0).flatten(1)
        torch.testing.assert_close(motion_grams(History(source), points)["a"], moved @ moved.T)


def test_factors_in_single_precision_give_inner_products_in_double() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [LoraFactors(torch.randn(2, 5, generator=generator), torch.ones(4, 2), 1.0) for _ in range(3)]
    found = motion_grams(History(MemorySource({step: {"a": at} for step, at in enumerate(factors)})), (0, 1, 2))["a"]
    moved = torch.stack([at.A.double().flatten() for at in factors]).diff(dim=0)
    torch.testing.assert_close(found, moved @ moved.T, rtol=1e-14, atol=0)


def test_agreement_is_the_share_of_a_motion_that_the_next_one_repeats() -> None:
    before, aside = noise(1, 30), noise(2, 30)
    aside -= (aside @ before) / (before @ before) * before
    steps = torch.stack([0.5 * before, 0.5 * before, 0.3 * before, 0.1 * before + aside])
    assert float(agreement(steps @ steps.T, slice(0, 2), slice(2, 4))) == pytest.approx(0.4)
    slow = torch.stack([1e-3 * steps, steps])
    assert agreement(slow @ slow.mT, slice(0, 2), slice(2, 4)).tolist() == pytest.approx([0.4, 0.4])
    assert math.isnan(float(agreement(torch.zeros(2, 2), slice(0, 1), slice(1, 2))))

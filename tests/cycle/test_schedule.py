"""When a run observes and when it tries a jump."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next_core.plugins import make_predictor
from next_core.run_config import Schedule
from tests.errors import raises_kind


@pytest.mark.parametrize(
    ("fields", "total"), [({"observe": 50}, 49), ({"observe": 50, "settle": 51}, 100), ({"observe": 50}, 0)]
)
def test_a_run_without_room_for_a_jump_is_refused_with_its_numbers(fields: dict[str, Any], total: int) -> None:
    with raises_kind("config-schedule", "observe (50)", f"{total} steps"):
        Schedule(every=5, **fields).check_predictor(make_predictor("stay"), total)


@pytest.mark.parametrize(("window", "acts"), [(2, True), (3, False)])
def test_a_predictor_must_find_what_it_needs_in_the_checkpoints_up_to_a_jump(window: int, acts: bool) -> None:
    schedule, predictor = Schedule(observe=2, every=1), make_predictor("secant", window=window)
    with contextlib.nullcontext() if acts else raises_kind("config-schedule", "after step 2"):
        schedule.check_predictor(predictor, 10)


@settings(deadline=None)  # a machine with much else to do may keep a moment's work waiting
@given(
    every=st.integers(1, 8),
    observe=st.integers(1, 8),
    jump_every=st.none() | st.integers(1, 8),
    settle=st.integers(0, 30),
    total=st.integers(0, 120),
)
def test_attempts_are_at_checkpoints(every: int, observe: int, jump_every: int | None, settle: int, total: int) -> None:
    spacing = None if jump_every is None else jump_every * every
    schedule = Schedule(every=every, observe=observe * every, jump_every=spacing, settle=settle)
    steps = schedule.attempt_steps(total)
    assert all(schedule.observes(step) and schedule.observe <= step <= total - settle for step in steps)
    if steps and spacing is not None:
        assert steps == list(range(steps[0], steps[-1] + 1, spacing))
        assert steps[-1] + spacing > total - settle
    assert bool(steps) == (schedule.observe <= total - settle)

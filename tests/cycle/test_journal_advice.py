"""The advice at the end of a run: journalled, and never able to fail the run."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from next_core.cycle.journal import Journal
from next_core.cycle.journal_advice import journal_advice, rate_found
from next_core.cycle.loop import PredictExtendCycle
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from tests.cycle.descent import Descent


def cycle_of(backend: Descent, journal: Journal) -> PredictExtendCycle:
    stay: Any = functools.partial(make_predictor, "stay")
    return PredictExtendCycle(backend, stay, Schedule(observe=5), Guards(), 5, journal)


@pytest.fixture
def backend() -> Descent:
    made = Descent()
    made.train(5, made.observe)
    return made


def test_advice_is_made_of_the_checkpoints_and_the_jumps_and_journalled(backend: Descent) -> None:
    def advise(source: CheckpointSource, jumps: Sequence[Mapping[str, Any]]) -> str:
        return f"{len(source.steps)} checkpoints, jumps after {[jump['step'] for jump in jumps]}"

    journal = Journal()
    journal.append("jump", 3, accepted=True, reason="fine")
    text = journal_advice(cycle_of(backend, journal), advise, 5)
    assert text == "5 checkpoints, jumps after [3]"
    assert journal.records[1:] == [{"event": "advice", "step": 5, "text": text}]


def test_advice_that_fails_is_journalled_and_does_not_fail_the_run(backend: Descent) -> None:
    journal = Journal()
    assert journal_advice(cycle_of(backend, journal), lambda source, jumps: str(1 / 0), 5) is None
    [record] = journal.records
    assert (record["event"], record["step"]) == ("advice", 5)
    assert "ZeroDivisionError" in record["problem"]


def test_a_checkpoint_that_cannot_be_read_fails_the_run() -> None:
    class Damaged(Descent):
        def source(self) -> Any:
            raise CheckpointError("step 5 is damaged")

    with pytest.raises(CheckpointError):
        journal_advice(cycle_of(Damaged(), Journal()), lambda source, jumps: None, 5)


def scale(step: int, multiple: float, phase: int) -> dict[str, Any]:
    facts = {"accepted": True, "multiple": multiple, "rate": 1e-4 * multiple, "found": phase == 2, "diagnostics": {}}
    return {"event": "scale", "step": step, **facts}


def test_step_scaling_names_the_rate_it_found_and_the_range_it_used() -> None:
    text = rate_found([scale(5, 4.0, 1), scale(10, 20.0, 2), scale(15, 12.0, 2), scale(20, 5.0, 2)])
    assert text.startswith("Raise learning_rate to about 0.002. ")
    assert "0.0005 to 0.002" in text
    lower = rate_found([scale(10, 0.25, 0), scale(15, 0.2, 2)])
    assert lower.startswith("Lower learning_rate to about 2e-05. ")


def test_a_run_that_was_too_short_to_find_the_rate_says_so_and_a_right_rate_gets_no_advice() -> None:
    text = rate_found([scale(5, 4.0, 1)])
    assert text is not None
    assert "0.0004" in text
    assert "too short" in text
    assert rate_found([scale(5, 1.2, 1)]) is None
    assert rate_found([scale(5, 1.2, 2), scale(10, 0.5, 2)]) is None
    assert rate_found([]) is None

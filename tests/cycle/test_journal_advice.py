"""The advice at the end of a run: journalled, and never able to fail the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from next_core.cycle.journal import Journal
from next_core.cycle.journal_advice import journal_advice
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from tests.cycle.descent import Descent


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
    text = journal_advice(advise, backend, journal, 5)
    assert text == "5 checkpoints, jumps after [3]"
    assert journal.records[1:] == [{"event": "advice", "step": 5, "text": text}]


def test_advice_that_fails_is_journalled_and_does_not_fail_the_run(backend: Descent) -> None:
    journal = Journal()
    assert journal_advice(lambda source, jumps: str(1 / 0), backend, journal, 5) is None
    [record] = journal.records
    assert (record["event"], record["step"]) == ("advice", 5)
    assert "ZeroDivisionError" in record["problem"]


def test_a_checkpoint_that_cannot_be_read_fails_the_run() -> None:
    class Damaged(Descent):
        def source(self) -> Any:
            raise CheckpointError("step 5 is damaged")

    with pytest.raises(CheckpointError):
        journal_advice(lambda source, jumps: None, Damaged(), Journal(), 5)

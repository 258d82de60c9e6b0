"""``keep: needed``: which checkpoints a run deletes, and that its jumps do not depend on it."""

import logging
from typing import Any

import pytest
import torch

from next_core.cycle.journal import Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.retention import Retention
from next_core.plugins import make_predictor, resolve_any_predictor
from next_core.run_config import Guards, Schedule
from tests.cycle.descent import Descent
from tests.errors import raises_kind

SCHEDULE = {"observe": 20, "every": 5, "horizon": 10, "jump_every": 10, "settle": 10}
SECANT = {"name": "secant", "window": 10}


def trained(keep: str, predictor: dict[str, Any] = SECANT, guards: Guards | None = None, **schedule: Any) -> Any:
    backend, journal = Descent(), Journal()
    fields = Schedule(**(SCHEDULE | schedule), keep=keep)
    make = lambda: make_predictor(predictor["name"], **{k: v for k, v in predictor.items() if k != "name"})  # noqa: E731
    PredictExtendCycle(backend, make, fields, guards or Guards(), 60, journal).run()
    return backend, journal


@pytest.mark.parametrize(
    ("predictor", "guards", "schedule"),
    [
        (SECANT, {}, {}),
        (SECANT, {}, {"horizon": 12}),
        ({"name": "secant", "window": 5, "gate": {"window": 5}}, {}, {}),
        ({"name": "adaptive-secant", "target": 0.0}, {"probe": False}, {"observe": 40}),
        ({"name": "random"}, {}, {"average": 20}),
        (SECANT, {"recovery": 5, "max_drop": 1.0, "tolerance": 0.0}, {"alpha": 4.0}),
        ({"name": "relex"}, {}, {}),
    ],
    ids=lambda value: str(value),
)
def test_retention_changes_no_bit(predictor: dict[str, Any], guards: dict[str, Any], schedule: dict[str, Any]) -> None:
    every, all_records = trained("all", predictor, Guards(**guards), **schedule)
    some, records = trained("needed", predictor, Guards(**guards), **schedule)
    assert records.records == all_records.records
    assert any(record["event"] == "jump" and record["accepted"] for record in records.records)
    assert torch.equal(some.model.weight, every.model.weight)
    assert some.forgotten


def test_what_a_later_jump_a_recovery_and_the_mean_read_is_kept() -> None:
    schedule = Schedule(**SCHEDULE, average=30)
    kept = Retention(schedule, Guards(recovery=None), 60, reads=10)
    # The jump after 20 reads from 10, and that after 50, the last, from 40; the mean reads 31 to 60.
    assert [kept.oldest(step) for step in (5, 12, 20, 29, 39, 41, 50, 59, 60)] == [5, 10, 20, 20, 30, 31, 31, 31, 60]
    assert Retention(schedule, Guards(recovery=15), 60, reads=10).oldest(60) == 45
    assert Retention(schedule, Guards(), 60, reads=None).oldest(49) == 0
    assert kept.kept(29, [8, 16]) == [range(20, 30), range(8, 9), range(10, 17)]


def test_a_predictor_that_reads_everything_keeps_everything_and_the_run_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backend, _ = trained("needed", {"name": "relex"}, settle=0)
    assert backend.forgotten == [*range(5, 60, 5)]  # at the end, when nothing is read any more
    assert "'relex' reads all checkpoints" in caplog.text


def test_a_backend_that_cannot_delete_is_refused_before_the_run() -> None:
    backend = Descent()
    backend.forgets = False
    schedule = Schedule(**SCHEDULE, keep="needed")
    with raises_kind("backend-unsupported", "descent", "keep: all"):
        PredictExtendCycle(backend, lambda: make_predictor("secant"), schedule, Guards(), 60, Journal())


class Blind(Descent):
    """A trainer without anything to measure accuracy on."""

    measures = False

    def evaluate(self, split: Any = "validation") -> None:
        return None

    def follow_steps(self, windows: Any) -> None:
        self.windows = windows
        super().follow_steps(windows)


def test_where_no_mean_can_be_compared_none_keeps_checkpoints_and_one_is_kept_of_scaled_steps() -> None:
    backend, schedule = Blind(), Schedule(**SCHEDULE, average=40, keep="needed")
    PredictExtendCycle(backend, lambda: make_predictor("secant", window=10), schedule, Guards(), 60, Journal()).run()
    assert list(backend.checkpoints) == [60]
    PredictExtendCycle(backend, resolve_any_predictor("step-scale"), schedule, Guards(), 60, Journal())
    assert backend.windows == [20]

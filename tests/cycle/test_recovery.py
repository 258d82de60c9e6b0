"""After a jump: what is measured, what rolls it back, and what a resumed run knows of it."""

from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import pytest
import torch

from next_core.cycle.journal import Journal
from next_core.errors import GuardError
from next_core.run_config import Guards, Schedule
from tests.cycle.descent import Descent, LaunchedDescent
from tests.cycle.test_loop import ONE_JUMP, SCHEDULE, cycle, plain

RECOVERY = Guards(recovery=10)


def reading(*values: float | None) -> Callable[[float], Any]:
    """An accuracy that takes these values in turn, and 0.75 from then on."""
    each = chain(values, repeat(0.75))
    return lambda loss: next(each)


def verdicts(journal: Journal) -> list[tuple[int, bool]]:
    return [(jump["step"], jump["accepted"]) for jump in journal.jumps()]


@pytest.mark.parametrize(("read", "accepted"), [(0.5, True), (0.499, False), (float("nan"), False)])
@pytest.mark.parametrize(
    ("before", "guards", "undone_after"),
    [((0.75,), {"max_drop": 0.25}, 60), ((0.75, 0.75), {"recovery": 10, "tolerance": 0.25}, 50)],
    ids=["max_drop", "tolerance"],
)
def test_accuracy_may_fall_by_the_bound(
    before: tuple[float, ...], guards: dict[str, Any], undone_after: int, read: float, accepted: bool
) -> None:
    backend = Descent(accuracy=reading(*before, read))
    made = cycle(backend, guards=Guards(**guards), schedule=ONE_JUMP)
    made.run()
    assert verdicts(made.journal) == [(20, accepted)]
    # Undone after its recovery window, the run is back at step 20 with 30 steps to go.
    assert torch.equal(backend.model.weight, plain(undone_after).model.weight) is not accepted


def test_a_jump_that_was_rolled_back_does_not_count_towards_the_number_of_jumps() -> None:
    schedule = SCHEDULE.model_copy(update={"jumps": 1})
    made = cycle(Descent(accuracy=reading(0.75, 0.75, 0.1)), guards=RECOVERY, schedule=schedule)
    made.run()
    # After the rollback the history starts at step 30, so that only step 40 has a checkpoint ten steps before it.
    assert verdicts(made.journal) == [(20, False), (30, False), (40, True)]


def test_strict_makes_a_failed_recovery_an_error_and_a_good_one_none() -> None:
    cycle(Descent(), guards=RECOVERY, schedule=ONE_JUMP, strict=True).run()
    with pytest.raises(GuardError, match="step 30"):
        cycle(Descent(accuracy=reading(0.75, 0.75, 0.1)), guards=RECOVERY, schedule=ONE_JUMP, strict=True).run()


def test_without_a_measure_no_recovery_is_judged() -> None:
    made = cycle(Descent(accuracy=lambda loss: None), guards=RECOVERY)
    made.run()
    assert verdicts(made.journal) == [(20, True), (30, True), (40, True), (50, True)]
    assert {record["event"] for record in made.journal.records} == {"jump"}


def test_a_trend_is_not_measured_without_a_recovery_window() -> None:
    made = cycle(Descent(), guards=Guards(against="trend"), schedule=ONE_JUMP)
    made.run()
    assert [record["step"] for record in made.journal.records] == [20, 20, 20]


def test_without_an_earlier_measure_the_trend_is_flat() -> None:
    schedule = Schedule(observe=10, every=5, horizon=5, settle=10)
    backend = Descent(accuracy=reading(0.7, 0.7, 0.69))
    guards, predictor = Guards(recovery=10, against="trend"), {"name": "secant", "window": 5}
    made = cycle(backend, guards=guards, schedule=schedule, predictor=predictor)
    made.run()
    assert verdicts(made.journal) == [(10, True)]


def test_the_trend_is_that_of_accuracies_before_jumps() -> None:
    accuracy = reading(0.5, 0.6, 0.7, 0.75, 0.75, 0.87)
    made = cycle(Descent(accuracy=accuracy), guards=Guards(recovery=10, against="trend"))
    made.run()
    # From 0.6 before the jump at step 20 to 0.75 at step 30: 0.9 at step 40, less the tolerance.
    assert verdicts(made.journal)[:2] == [(20, True), (30, False)]


def test_a_probe_that_failed_is_made_again_where_it_is_needed() -> None:
    backend = Descent(accuracy=reading(0.5, float("nan"), 0.6, 0.6))
    made = cycle(backend, guards=Guards(recovery=10, against="trend"))
    made.run()
    assert made.journal.jumps()[0]["accuracy_before"] == 0.6  # the trend at step 20 could not be measured


def test_every_probe_is_journalled_before_what_it_decides() -> None:
    accuracy = reading(0.5, 0.6, 0.7, 0.8)
    made = cycle(Descent(accuracy=accuracy), guards=Guards(recovery=7, against="trend"), schedule=ONE_JUMP)
    made.run()
    told = [(record["event"], record["step"], record.get("accuracy")) for record in made.journal.records]
    assert told == [
        ("probe", 13, 0.5),  # for the trend at the jump
        ("probe", 20, 0.6),
        ("probe", 20, 0.7),
        ("jump", 20, None),
        ("probe", 27, 0.8),
        ("verify", 27, 0.8),
    ]


@pytest.mark.parametrize("average", [None, 20])
def test_a_launched_trainer_stands_still_wherever_something_is_measured(average: int | None) -> None:
    seen: dict[str, list[tuple[str, int]]] = {}
    journals, weights = [], []
    for backend in (Descent(), LaunchedDescent()):
        milestones = seen.setdefault(backend.name, [])
        made = cycle(
            backend,
            guards=Guards(recovery=7, against="trend"),
            schedule=SCHEDULE.model_copy(update={"average": average}),
            measure_every=4,
            milestone=lambda name, step, to=milestones: to.append((name, step)),
        )
        made.run()
        journals.append(made.journal.records)
        weights.append(backend.model.weight)
    assert journals[0] == journals[1]
    assert torch.equal(*weights)
    first, second = seen.values()
    assert first == second
    assert backend.calls == 32  # 24 steps observed or measured, 4 trends, 4 recoveries
    assert [step for name, step in first if name == "curve"] == list(range(4, 61, 4))
    around = [(name, step) for name, step in first if step in (20, 60)]
    ending = [] if average is None else [("before_average", 60)]
    assert around == [("before_jump", 20), ("after_jump", 20), ("curve", 20), *ending, ("curve", 60)]


@pytest.mark.parametrize("trainer", [Descent, LaunchedDescent])
@pytest.mark.parametrize("against", ["start", "trend"])
@pytest.mark.parametrize("step", [8, 19, 25, 30, 40, 45])
@pytest.mark.parametrize(
    "readings",
    [(), (0.5, 0.6, 0.65, 0.5), (0.5, float("nan"), 0.6, 0.6, 0.75, 0.75, 0.8)],
    ids=["recovers", "fails", "has a probe that failed"],
)
def test_a_resumed_run_decides_alike(
    trainer: type[Descent], step: int, against: Any, readings: tuple[float, ...]
) -> None:
    guards = Guards(recovery=10, against=against)
    schedule = SCHEDULE.model_copy(update={"jumps": 2})

    def fresh() -> Descent:
        return trainer(accuracy=reading(*readings) if readings else None)

    seen: list[tuple[str, int]] = []
    settings: dict[str, Any] = {
        "guards": guards, "schedule": schedule, "milestone": lambda name, step: seen.append((name, step)),
    }  # fmt: skip
    whole = cycle(fresh(), **settings)
    whole.run()
    uninterrupted = seen.copy()
    seen.clear()
    backend, journal = fresh(), Journal()
    backend.train(step, cycle(backend, journal=journal, **settings).after_step)
    again = cycle(backend, journal=journal, **settings)
    again.resume(step)
    assert again.run() == 60
    assert seen == uninterrupted
    resumes = [record for record in journal.records if record["event"] == "resume"]
    assert resumes == [{"event": "resume", "step": step}]
    assert [record for record in journal.records if record["event"] != "resume"] == whole.journal.records

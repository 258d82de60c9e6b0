"""The predict-extend cycle, on a trainer whose every number is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from next_core.cycle.journal import Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.errors import CheckpointError, ConfigError, GuardError
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from tests.cycle.descent import Descent, LaunchedDescent

SCHEDULE = Schedule(observe=20, every=5, horizon=10, jump_every=10, settle=10)


def cycle(backend: Descent, total: int = 60, **fields: Any) -> PredictExtendCycle:
    predictor = fields.pop("predictor", {"name": "secant", "window": 10})
    settings = {
        "predictor": lambda: make_predictor(predictor["name"], window=predictor["window"]),
        "schedule": SCHEDULE,
        "guards": Guards(),
        "journal": Journal(),
    } | fields
    return PredictExtendCycle(backend, total=total, **settings)


def plain(total: int = 60) -> Descent:
    backend = Descent()
    backend.train(total, lambda step: None)
    return backend


def test_jumps_reach_in_60_steps_what_plain_descent_does_not() -> None:
    backend = Descent()
    made = cycle(backend)
    made.run()
    assert [jump["step"] for jump in made.journal.jumps()] == [20, 30, 40, 50]
    assert all(jump["accepted"] for jump in made.journal.jumps())
    assert backend.loss < 0.6 * plain().loss


def test_a_launched_trainer_and_a_callback_run_through_the_same_states() -> None:
    inside, launched = Descent(), LaunchedDescent()
    journals = []
    for backend in (inside, launched):
        made = cycle(backend)
        made.run()
        journals.append(made.journal.records)
    assert journals[0] == journals[1]
    assert torch.equal(inside.model.weight, launched.model.weight)
    assert inside.calls == 1
    assert launched.calls == 12  # one segment for each checkpoint


def test_one_jump_is_the_schedule_without_jump_every() -> None:
    made = cycle(Descent(), schedule=Schedule(observe=20, every=5, horizon=10, settle=10))
    made.run()
    assert [jump["step"] for jump in made.journal.jumps()] == [20]


def test_jumps_bounds_the_jumps_that_are_made() -> None:
    schedule = SCHEDULE.model_copy(update={"jumps": 2})
    made = cycle(Descent(), schedule=schedule)
    made.run()
    assert [jump["step"] for jump in made.journal.jumps()] == [20, 30]


def test_a_refused_jump_leaves_the_run_plain_and_strict_makes_it_an_error() -> None:
    tight = Guards(max_norm_ratio=1e-6)
    backend = Descent()
    made = cycle(backend, guards=tight)
    made.run()
    assert {jump["accepted"] for jump in made.journal.jumps()} == {False}
    assert torch.equal(backend.model.weight, plain().model.weight)
    with pytest.raises(GuardError, match="max_norm_ratio"):
        cycle(Descent(), guards=tight, strict=True).run()


def test_an_abstention_is_journalled_with_its_reason() -> None:
    made = cycle(Descent(), predictor={"name": "secant", "window": 40})
    made.run()
    first, *_, last = made.journal.jumps()
    assert "no checkpoint 40 steps before step 20" in first["reason"]
    assert last["accepted"]


def test_a_predictor_that_can_never_act_on_the_schedule_is_refused_before_the_run() -> None:
    for name, fields in (("secant", {"window": 7}), ("secant", {"window": 5, "gate": {"window": 30}})):
        with pytest.raises(ConfigError, match="can never act on this schedule; after step 50"):
            PredictExtendCycle(
                Descent(), lambda n=name, f=fields: make_predictor(n, **f), SCHEDULE, Guards(), 60, Journal()
            )
    late = SCHEDULE.model_copy(update={"horizon": 55})
    for name in ("ridge", "next-mlp"):
        with pytest.raises(ConfigError, match="steps apart"):
            PredictExtendCycle(Descent(), lambda n=name: make_predictor(n), late, Guards(), 60, Journal())


def test_the_history_shows_what_descent_did_and_not_what_jumps_did() -> None:
    backend = Descent()
    cycle(backend).run()
    source = backend.source()
    rate = 0.01
    for before, after in ((25, 30), (30, 35)):
        delta = source.delta("weight", after, since=before)
        # Gradient descent contracts the distance to the goal; a jump in the delta would show as a multiple of it.
        assert float(torch.as_tensor(delta).norm()) < 5 * rate * backend.goal.sub(backend.backbone).norm()


def test_a_jump_that_drops_accuracy_is_rolled_back_at_once() -> None:
    readings = iter([0.8, 0.3] + [0.8, 0.8] * 10)
    backend = Descent(accuracy=lambda loss: next(readings))
    made = cycle(backend)
    made.run()
    first, *others = made.journal.jumps()
    assert not first["accepted"]
    assert "fell from 0.800 to 0.300" in first["reason"]
    assert all(jump["accepted"] for jump in others)


def test_a_jump_that_does_not_recover_is_rolled_back_and_the_history_starts_anew() -> None:
    readings = iter([0.8, 0.8, 0.5] + [0.8] * 40)
    backend = Descent(accuracy=lambda loss: next(readings))
    made = cycle(backend, guards=Guards(recovery=10))
    made.run()
    first, *_ = made.journal.jumps()
    assert not first["accepted"]
    assert "0.5 after 10 steps" in first["reason"]
    assert first["accuracy_recovered"] == 0.5
    assert backend.source().steps[0] == 30


def test_recovery_is_held_against_the_trend_when_asked() -> None:
    # A plain trend of +.1 in ten steps: staying where the run was is not enough, reaching the trend is.
    for end, accepted in ((0.72, False), (0.80, True)):
        readings = iter([0.6, 0.7, 0.7, end] + [0.9] * 40)
        made = cycle(Descent(accuracy=lambda loss, r=readings: next(r)), guards=Guards(recovery=10, against="trend"))
        made.run()
        assert made.journal.jumps()[0]["accepted"] is accepted


def test_no_jump_is_tried_while_another_recovers() -> None:
    schedule = SCHEDULE.model_copy(update={"settle": 15})
    made = cycle(Descent(), guards=Guards(recovery=15), schedule=schedule)
    made.run()
    assert [jump["step"] for jump in made.journal.jumps()] == [20, 40]


def test_probes_can_be_switched_off() -> None:
    def never(loss: float) -> float:
        raise AssertionError

    made = cycle(Descent(accuracy=never), guards=Guards(probe=False))
    made.run()
    assert made.journal.jumps()[0]["accuracy_before"] is None


def test_milestones_surround_the_first_jump_that_is_made() -> None:
    seen: list[tuple[str, float]] = []
    backend = Descent()
    cycle(backend, milestone=lambda name, step: seen.append((name, backend.loss))).run()
    assert [name for name, _ in seen] == ["before_jump", "after_jump"]
    assert seen[1][1] < seen[0][1]


def test_resuming_counts_the_jumps_that_were_made_before_and_forgets_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    schedule = SCHEDULE.model_copy(update={"jumps": 2})
    cycle(Descent(), schedule=schedule, journal=Journal(path)).run()
    again = cycle(Descent(), schedule=schedule, journal=Journal(path))
    again.resume(25)
    again.after_step(26)
    assert [jump["step"] for jump in again.journal.jumps()] == [20]
    assert again._made == 1


def test_a_window_that_was_open_cannot_be_judged_without_what_to_go_back_to(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    guards = Guards(recovery=10)
    cycle(Descent(), guards=guards, journal=Journal(path)).run()
    again = cycle(Descent(), guards=guards, journal=Journal(path))
    again.resume(25)
    with pytest.raises(CheckpointError, match="still to be judged"):
        again.after_step(26)


def test_a_damaged_history_costs_the_jump_and_not_the_run() -> None:
    class Damaged(Descent):
        def source(self) -> Any:
            raise CheckpointError("step 20 is damaged")

    backend = Damaged()
    made = cycle(backend)
    made.run()
    assert {jump["reason"] for jump in made.journal.jumps()} == {"step 20 is damaged"}
    assert torch.equal(backend.model.weight, plain().model.weight)


def test_a_probe_that_fails_or_is_not_finite_is_journalled_and_judges_nothing() -> None:
    def broken(loss: float) -> float:
        raise RuntimeError("no validation set")

    for accuracy in (broken, lambda loss: float("nan")):
        made = cycle(Descent(accuracy=accuracy))
        made.run()
        assert all(jump["accepted"] for jump in made.journal.jumps())
        assert all("problem" in record for record in made.journal.records if record["event"] == "probe")


def test_an_accuracy_that_is_gone_after_the_jump_counts_as_a_fall() -> None:
    readings = iter([0.8, float("nan")] + [0.8] * 40)
    made = cycle(Descent(accuracy=lambda loss: next(readings)))
    made.run()
    first, *_ = made.journal.jumps()
    assert not first["accepted"]
    assert "cannot be measured" in first["reason"]


def test_the_last_recovery_window_must_end_before_the_run() -> None:
    with pytest.raises(ConfigError, match="settle"):
        cycle(Descent(), guards=Guards(recovery=15))


def test_diagnostics_cannot_disturb_the_journal() -> None:
    class Chatty(type(make_predictor("secant"))):  # type: ignore[misc]
        def predict(self, horizon: int) -> Any:
            made = super().predict(horizon)
            return dataclasses.replace(made, diagnostics={"step": torch.tensor(3.0), "reason": 1})

    made = PredictExtendCycle(Descent(), lambda: Chatty(), SCHEDULE, Guards(), 60, Journal())
    made.run()
    assert made.journal.jumps()[0]["diagnostics"] == {"step": 3.0, "reason": 1.0}

"""The predict-extend cycle, on a trainer whose every number is known."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from next_core.cycle.journal import Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.errors import BackendError, CheckpointError
from next_core.interfaces import Prediction
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from tests.cycle.descent import Descent, LaunchedDescent
from tests.errors import raises_kind

SCHEDULE = Schedule(observe=20, every=5, horizon=10, jump_every=10, settle=10)
ONE_JUMP = Schedule(observe=20, every=5, horizon=10, settle=10)


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


def test_a_refused_jump_leaves_the_run_plain_and_strict_makes_it_an_error() -> None:
    tight = Guards(max_norm_ratio=1e-6)
    backend = Descent()
    made = cycle(backend, guards=tight)
    made.run()
    assert {jump["accepted"] for jump in made.journal.jumps()} == {False}
    assert torch.equal(backend.model.weight, plain().model.weight)
    with raises_kind("guard-refused", "step 20", "max_norm_ratio"):
        cycle(Descent(), guards=tight, strict=True).run()


def test_an_abstention_is_journalled_with_its_reason() -> None:
    made = cycle(Descent(), predictor={"name": "secant", "window": 40})
    made.run()
    first, *_, last = made.journal.jumps()
    assert "no checkpoint 40 steps before step 20" in first["reason"]
    assert (first["predictor"], first["alpha"], first["norm_ratio"]) == ("secant", 1.0, None)
    assert not {"norm", "accuracy_before", "accuracy_after"} & set(first)  # of stages that were not reached
    assert last["accepted"]


@pytest.mark.parametrize(
    ("name", "fields", "horizon"),
    [("secant", {"window": 7}, 10), ("secant", {"window": 5, "gate": {"window": 30}}, 10), ("next-mlp", {}, 55)],
)
def test_a_predictor_that_can_never_act_is_refused_at_once(name: str, fields: dict[str, Any], horizon: int) -> None:
    schedule = SCHEDULE.model_copy(update={"horizon": horizon})
    with raises_kind("config-schedule", f"'{name}'", "after step 50"):
        PredictExtendCycle(Descent(), lambda: make_predictor(name, **fields), schedule, Guards(), 60, Journal())


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
    assert {record["event"] for record in made.journal.records} == {"jump"}


def test_a_window_that_was_open_cannot_be_judged_without_what_to_go_back_to(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    guards = Guards(recovery=10)
    cycle(Descent(), guards=guards, journal=Journal(path)).run()
    again = cycle(Descent(), guards=guards, journal=Journal(path))
    again.resume(25)
    with raises_kind("checkpoint-no-history", "step 20"):
        again.after_step(26)


def test_a_probe_that_fails_or_is_not_finite_is_journalled_and_judges_nothing() -> None:
    def broken(loss: float) -> float:
        raise RuntimeError("no validation set")

    for accuracy in (broken, lambda loss: float("nan"), lambda loss: "much"):
        made = cycle(Descent(accuracy=accuracy))
        made.run()
        assert all(jump["accepted"] for jump in made.journal.jumps())
        probes = [record for record in made.journal.records if record["event"] == "probe"]
        assert len(probes) == 8
        assert all(record["accuracy"] is None and "problem" in record for record in probes)


def test_an_accuracy_may_be_a_tensor(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    cycle(Descent(accuracy=lambda loss: torch.tensor(0.5)), schedule=ONE_JUMP, journal=journal).run()
    assert [jump["accuracy_after"] for jump in Journal(journal.path).jumps()] == [0.5]


def test_diagnostics_cannot_disturb_the_journal() -> None:
    class Chatty(type(make_predictor("secant"))):
        def predict(self, horizon: int) -> Any:
            made = super().predict(horizon)
            return dataclasses.replace(made, diagnostics={"step": torch.tensor(3.0), "reason": 1})

    made = PredictExtendCycle(Descent(), Chatty, SCHEDULE, Guards(), 60, Journal())
    made.run()
    assert made.journal.jumps()[0]["diagnostics"] == {"step": 3.0, "reason": 1.0}


@pytest.mark.parametrize("trainer", [Descent, LaunchedDescent])
def test_a_run_reports_every_step_and_ends_after_the_last(trainer: type[Descent]) -> None:
    steps: list[int] = []
    backend = trainer()
    assert cycle(backend, total=58).run(steps.append) == 58
    assert steps == list(range(1, 59))
    assert sorted(backend.checkpoints) == list(range(5, 58, 5))  # only a run that averages observes its last step


def test_an_interrupted_run_ends_after_its_step() -> None:
    steps: list[int] = []
    backend = Descent()
    assert cycle(backend, interrupted=lambda: len(steps) == 23).run(steps.append) == 23
    assert backend.step == len(steps) == 23


def test_a_jump_is_journalled_with_what_was_predicted_and_how_large_it_is() -> None:
    backend = Descent()
    made = cycle(backend, total=30, schedule=Schedule(observe=20, every=5, horizon=10, alpha=0.5))
    made.run()
    jump = made.journal.jumps()[0]
    recent = backend.checkpoints[20]["weight"] - backend.checkpoints[10]["weight"]
    assert jump["predictor"] == "secant"
    assert (jump["alpha"], jump["horizon"]) == (0.5, 10)
    assert jump["norm"] == pytest.approx(float(backend.shift.norm()), rel=1e-5)
    assert jump["norm_ratio"] == pytest.approx(jump["norm"] / float(recent.norm()), rel=1e-5)
    assert jump["accuracy_after"] > jump["accuracy_before"]
    assert "1 of 1 matrices" in jump["reason"]


@pytest.mark.parametrize(("times", "accepted"), [(1.0, True), (0.999, False), (None, True)])
def test_a_jump_may_be_as_large_as_the_bound_and_no_larger(times: float | None, accepted: bool) -> None:
    first = cycle(Descent())
    first.run()
    ratio = first.journal.jumps()[0]["norm_ratio"]
    made = cycle(Descent(), guards=Guards(max_norm_ratio=None if times is None else times * ratio))
    made.run()
    jump = made.journal.jumps()[0]
    assert jump["accepted"] is accepted
    assert jump["norm_ratio"] == ratio


def test_no_jump_is_made_from_an_older_checkpoint() -> None:
    class Forgetful(Descent):
        def observe(self, step: int) -> None:
            if step != 20:
                super().observe(step)

    made = cycle(Forgetful())
    made.run()
    first, *_, last = made.journal.jumps()
    assert not first["accepted"]
    assert "step 15" in first["reason"]
    assert last["accepted"]


def test_a_predictor_is_given_the_progress_and_the_jumps_tried_so_far() -> None:
    told: list[str] = []
    seen: list[tuple[Any, list[int]]] = []
    ranks: set[int] = set()

    class Curious(type(make_predictor("secant"))):
        def fit(self, history: Any) -> Any:
            seen.append((self.progress, [jump["step"] for jump in history.jump_log]))
            ranks.add(history.rank)
            return super().fit(history)

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)

    PredictExtendCycle(Descent(), Curious, SCHEDULE, Guards(), 60, Journal(), progress=progress).run()
    assert seen == [(progress, []), (progress, [20]), (progress, [20, 30]), (progress, [20, 30, 40])]
    assert told
    assert ranks == {1}


def test_a_jump_that_the_trainer_cannot_make_is_tried_once() -> None:
    class Unable(Descent):
        def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Any:
            raise BackendError("this model takes no jump adapter", kind="backend-unsupported")

    made = cycle(Unable())
    made.run()
    assert [(jump["step"], jump["accepted"]) for jump in made.journal.jumps()] == [(20, False)]
    assert "takes no jump adapter" in made.journal.jumps()[0]["reason"]


def test_what_fails_while_predicting_or_jumping_costs_the_jump_and_not_the_run() -> None:
    class Stuck(Descent):
        def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Any:
            raise ZeroDivisionError

    class Damaged(Descent):
        def source(self) -> Any:
            raise CheckpointError("step 20 is damaged")

    class Slow(type(make_predictor("secant"))):
        def predict(self, horizon: int) -> Any:
            while True:
                pass

    made_once = iter([make_predictor("secant")])
    for backend, predictor, limit, reason, name in (
        (Stuck(), lambda: make_predictor("secant"), None, "ZeroDivisionError", "secant"),
        (Damaged(), lambda: make_predictor("secant"), None, "step 20 is damaged", "secant"),
        (Descent(), Slow, 0.05, "0.05", "secant"),
        (Descent(), lambda: next(made_once), None, "StopIteration", "?"),
    ):
        made = PredictExtendCycle(backend, predictor, ONE_JUMP, Guards(time_limit=limit), 60, Journal())
        made.run()
        [jump] = made.journal.jumps()
        assert (jump["step"], jump["accepted"], jump["predictor"], jump["alpha"]) == (20, False, name, 1.0)
        assert reason in jump["reason"]
        assert torch.equal(backend.model.weight, plain().model.weight)

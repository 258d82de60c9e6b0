"""A jump whose alpha validation accuracy chooses, and EffOPD's triggers."""

from typing import Any

import pytest
import torch

from next_core.cycle.journal import Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from tests.cycle.descent import Descent
from tests.predictors.test_secant import weights
from tests.predictors.trajectories import dense_run, drift, history

LOOSE = Guards(probe=False, max_norm_ratio=None)
LINE = {"observe": 20, "every": 10, "horizon": 10, "settle": 10}  # One jump along the last 10 steps, at step 20


def descended(alphas: list[float] | None, guards: Guards = LOOSE, accuracy: Any = None, **fields: Any) -> Any:
    backend, journal = Descent(accuracy=accuracy), Journal()
    schedule = Schedule(**LINE, alphas=alphas, **fields)
    PredictExtendCycle(backend, lambda: make_predictor("secant"), schedule, guards, 40, journal).run()
    [jump] = journal.jumps()
    return backend, jump, [record["accuracy"] for record in journal.records if record["event"] == "probe"]


def test_it_is_the_last_alpha_up_to_which_accuracy_rises() -> None:
    # Each step covers 1% of the way to the goal, so the last ten are .99^-10 - 1 = 10.6% of what is left: alpha 8
    # leaves 15% of it, and 16 overshoots by 69%.
    backend, jump, probed = descended([2, 8, 16, 4])
    assert (jump["accepted"], jump["alpha"]) == (True, 8)
    assert [list(jump["diagnostics"])[-1], len(probed)] == ["accuracy at alpha 16", 4]
    assert jump["diagnostics"]["accuracy at alpha 8"] == max(probed)
    directly, same, _ = descended(None, alpha=8)
    assert torch.equal(backend.model.weight, directly.model.weight)
    assert jump["norm"] == same["norm"]


def test_without_a_rise_nothing_moves() -> None:
    backend, jump, probed = descended([30, 8])
    plain = Descent()
    plain.train(40, lambda step: None)
    assert torch.equal(backend.model.weight, plain.model.weight)
    assert (jump["accepted"], len(probed)) == (False, 2)
    assert "alpha 30" in jump["reason"]


def test_the_norm_guard_judges_the_alpha_that_was_chosen() -> None:
    _, jump, _ = descended([2, 8], LOOSE.model_copy(update={"max_norm_ratio": 5}))
    assert not jump["accepted"]
    assert jump["norm_ratio"] == pytest.approx(8.0)


def test_a_probe_that_cannot_measure_refuses_the_jump() -> None:
    _, jump, _ = descended([2], accuracy=lambda loss: float("nan"))
    assert not jump["accepted"]
    assert "measure" in jump["reason"]


def test_effopd_jumps_at_powers_of_two_along_the_motion_since_the_last() -> None:
    cls = type(make_predictor("effopd"))
    schedule = Schedule(**cls.recommended["schedule"])
    backend, journal = Descent(), Journal()
    PredictExtendCycle(backend, lambda: make_predictor("effopd"), schedule, LOOSE, 40, journal).run()
    jumps = {jump["step"]: jump for jump in journal.jumps()}
    assert [step for step, jump in jumps.items() if jump["accepted"]] == [1, 2, 4, 8, 16, 32]
    assert jumps[1]["alpha"] == 10
    assert "3 is none" in jumps[3]["reason"]
    found = make_predictor("effopd").fit(history(dense_run({"a": drift(1)}, [4, 8]))).predict(1)
    assert weights(found) == {8: 1.0, 4: -1.0}

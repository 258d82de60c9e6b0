"""The mean at the end of a run: chosen by validation, among windows, or not taken."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from next_backends.history_folder import HistoryFolder
from next_core.cycle.average import mean_of_last, windows
from next_core.cycle.journal import Journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.run import run
from next_core.interfaces import Prediction
from next_core.live_weights.in_memory import InMemoryApplied
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from next_core.sources.adapter_source import PeftAdapterSource, PeftAdapterSourceConfig
from next_core.sources.jumps import SHIFT_FILE
from tests.cycle.descent import Descent
from tests.cycle.test_run import config
from tests.errors import raises_kind
from tests.predictors.trajectories import curve, curved_lora_run, dense_run, resolve_dense


def test_windows_are_the_whole_a_half_and_a_quarter_of_two_checkpoints_at_least() -> None:
    assert windows(80, 2) == [20, 40, 80]
    assert windows(80, 20) == [40, 80]
    assert windows(8, 4) == [8]


def test_the_mean_is_of_the_last_checkpoints_of_each_factor_where_it_is_lora_else_of_the_weights() -> None:
    lora, whole = curved_lora_run(), dense_run({"a": curve(1)})
    last = (80, 90, 100)
    at = [lora.factors("a", step) for step in last]
    A, B = (torch.stack([getattr(one, side) for one in at]).mean(0) for side in "AB")
    expected = 2 * B @ A - 2 * at[-1].B @ at[-1].A
    moved = torch.stack([curve(1)(step) for step in last]).mean(0) - curve(1)(100)
    for source, space, wanted in ((lora, "factors", expected), (whole, "merged", moved)):
        mean = mean_of_last(source, 30)
        update = mean.updates["a"]
        assert update.space == space
        assert (mean.step, mean.horizon) == (100, 0)
        torch.testing.assert_close(resolve_dense(mean, "a"), wanted)


def descend(backend: Descent, **schedule: Any) -> Journal:
    journal = Journal()
    fields = {"observe": 10, "every": 1, "horizon": 1, "average": 8} | schedule
    PredictExtendCycle(
        backend, lambda: make_predictor("stay"), Schedule(**fields), Guards(probe=False), 20, journal
    ).run()
    return journal


def test_a_run_that_swings_about_its_optimum_ends_in_the_middle() -> None:
    swinging = Descent(lr=1.999)
    plain = Descent(lr=1.999)
    plain.train(20, lambda step: None)
    [record] = [r for r in descend(swinging).records if r["event"] == "average"]
    assert record["accepted"]
    assert swinging.loss < plain.loss / 100
    assert max(record["tried"].values()) > record["accuracy_before"]


def test_a_last_step_without_a_checkpoint_gets_one() -> None:
    backend = Descent(lr=1.999)
    [record] = [r for r in descend(backend, every=3, observe=9, average=6).records if r["event"] == "average"]
    assert backend.source().steps[-1] == 20
    assert record["tried"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("readings", "window"),
    [((0.5, 0.6, 0.9, 0.7), 4), ((0.5, NAN, 0.4, 0.7), 8), ((0.5, 0.5, 0.4, NAN), None), ((NAN,), None)],
)
def test_the_window_that_validates_best_is_taken_if_better(readings: tuple[float, ...], window: int | None) -> None:
    each = iter(readings)
    backend = Descent(accuracy=lambda loss: next(each))
    [record] = [r for r in descend(backend).records if r["event"] == "average"]
    assert record["accepted"] == (window is not None)
    assert list(each) == []
    assert record["tried"] == {
        str(size): None if math.isnan(value) else value for size, value in zip((2, 4, 8), readings[1:], strict=False)
    }
    last = [backend.checkpoints[step]["weight"] for step in range(21 - (window or 1), 21)]
    torch.testing.assert_close(backend.model.weight.detach(), torch.stack(last).mean(0))


def test_a_mean_has_to_be_better_than_what_a_jump_after_the_last_step_reached() -> None:
    each = iter([0.5, 0.7, 0.8, 0.75, 0.6, 0.6])
    journal = Journal()
    schedule = Schedule(observe=20, every=1, horizon=1, average=8)
    backend = Descent(accuracy=lambda loss: next(each))
    PredictExtendCycle(backend, lambda: make_predictor("secant", window=1), schedule, Guards(), 20, journal).run()
    record = journal.records[-1]
    assert (record["accuracy_before"], record["accepted"]) == (0.8, False)


@pytest.mark.parametrize("fails", [1, 2, 4])
def test_a_mean_that_cannot_be_taken_leaves_the_run_where_it_is(fails: int) -> None:
    class Failing(Descent):
        tries = 0

        def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> InMemoryApplied:
            self.tries += 1
            if self.tries == fails:
                raise ZeroDivisionError
            return super().apply_jump(prediction, alpha, keep)

    backend, plain = Failing(lr=1.999), Descent(lr=1.999)
    plain.train(20, lambda step: None)
    [record] = [r for r in descend(backend).records if r["event"] == "average"]
    assert record["accepted"] == (fails == 2)  # the first mean was tried, and is better
    if fails == 2:
        assert set(record["tried"]) == {"2"}
        assert backend.loss < plain.loss
    else:
        assert "ZeroDivisionError" in record["reason"]
        assert torch.equal(backend.model.weight, plain.model.weight)


@pytest.mark.trl
def test_a_run_of_the_real_trainer_ends_in_the_mean_of_its_factors(tmp_path: Path) -> None:
    settings = config(
        tmp_path,
        predictor="stay",
        schedule={"average": 8, "every": 1},
        guards={"probe": False},
        training={"learning_rate": 1e-2},  # far too large: the mean has to be better
    )
    result = run(settings, tmp_path / "run")
    assert result.average["accepted"]
    window = int(result.average["reason"].split()[-2])
    assert result.accuracy["before_average"] != result.accuracy["final"]
    folder = tmp_path / "run" / "checkpoints"
    stored = [load_file(folder / f"step-{step:06d}" / "adapter_model.safetensors") for step in range(17 - window, 17)]
    made = HistoryFolder(tmp_path / "run").jump_at(16)
    shift = load_file(made[0] / SHIFT_FILE)
    assert len(shift) == len(stored[-1])
    for key, last in stored[-1].items():
        matrix, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        mean = torch.stack([tensors[key].double() for tensors in stored]).mean(0)
        moved = last.double() + shift[f"{matrix}.weight.{side}"].double()
        torch.testing.assert_close(moved, mean, atol=1e-6, rtol=1e-5)
    source = PeftAdapterSource(PeftAdapterSourceConfig(path=folder))
    assert mean_of_last(source, window).step == 16


def test_an_average_of_less_than_two_checkpoints_is_named_in_the_config(tmp_path: Path) -> None:
    with raises_kind("config-contradiction", "average (7)", "every (8)"):
        config(tmp_path, schedule={"average": 7})

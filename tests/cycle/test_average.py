"""The mean at the end of a run: chosen by validation, among windows, or not taken."""

from __future__ import annotations

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
from next_core.errors import ConfigError
from next_core.plugins import make_predictor
from next_core.run_config import Guards, Schedule
from next_core.sources.adapter_source import PeftAdapterSource, PeftAdapterSourceConfig
from next_core.sources.jumps import SHIFT_FILE
from tests.cycle.descent import Descent
from tests.cycle.test_run import config


def test_windows_are_the_whole_a_half_and_a_quarter_of_two_checkpoints_at_least() -> None:
    assert windows(80, 2) == [20, 40, 80]
    assert windows(80, 20) == [40, 80]
    assert windows(8, 4) == [8]


def test_an_average_of_one_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two checkpoints"):
        Schedule(every=5, average=9)


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


def test_a_run_that_still_climbs_is_left_where_it_is() -> None:
    climbing, plain = Descent(lr=0.001), Descent(lr=0.001)
    plain.train(20, lambda step: None)
    [record] = [r for r in descend(climbing).records if r["event"] == "average"]
    assert not record["accepted"]
    assert set(record["tried"]) == {"2", "4", "8"}
    assert climbing.loss == plain.loss


def test_without_a_measure_nothing_moves() -> None:
    blind = Descent(lr=1.999, accuracy=lambda loss: None)  # type: ignore[arg-type, return-value]
    [record] = [r for r in descend(blind).records if r["event"] == "average"]
    assert (record["accepted"], record["tried"]) == (False, {})


def test_a_last_step_without_a_checkpoint_gets_one() -> None:
    backend = Descent(lr=1.999)
    [record] = [r for r in descend(backend, every=3, observe=9, average=6).records if r["event"] == "average"]
    assert backend.source().steps[-1] == 20
    assert record["tried"]


@pytest.mark.trl
def test_a_run_of_the_real_trainer_ends_in_the_mean_of_its_factors(tmp_path: Path) -> None:
    settings = config(
        predictor="stay",
        schedule={"average": 8, "every": 1, "observe": 8, "horizon": 4, "jump_every": 4, "settle": 4},
        guards={"probe": False},
        training={"learning_rate": 3e-2},  # far too large: the mean has to be better
    )
    result = run(settings, tmp_path / "run")
    assert result.average is not None
    assert result.average["accepted"]
    window = int(result.average["reason"].split()[-2])
    assert result.accuracy["before_average"] != result.accuracy["final"]
    folder = tmp_path / "run" / "checkpoints"
    stored = [load_file(folder / f"step-{step:06d}" / "adapter_model.safetensors") for step in range(17 - window, 17)]
    made = HistoryFolder(tmp_path / "run").jump_at(16)
    assert made is not None
    shift = load_file(made[0] / SHIFT_FILE)
    assert len(shift) == len(stored[-1])
    for key, last in stored[-1].items():
        matrix, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        mean = torch.stack([tensors[key].double() for tensors in stored]).mean(0)
        moved = last.double() + shift[f"{matrix}.weight.{side}"].double()
        torch.testing.assert_close(moved, mean, atol=1e-6, rtol=1e-5)
    source = PeftAdapterSource(PeftAdapterSourceConfig(path=folder))
    assert mean_of_last(source, window).step == 16


def test_an_average_of_less_than_two_checkpoints_is_named_in_the_config() -> None:
    with pytest.raises(ConfigError, match="at least two checkpoints"):
        config(schedule={"average": 7})

"""What a run config may ask of each way to go on from a jump."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig
from next_backends.openrlhf.run_checks import check_run
from next_core.errors import ConfigError
from next_core.run_config import RunConfig

FULL = {"lora": None}


def check(jump: str, training: dict[str, Any], **run: Any) -> None:
    fields = {"model": Path("model"), "data": {"train": Path("train.jsonl")}, **training}
    config = OpenRlhfConfig(python=Path("python"), jump=jump)
    check_run(RunConfig.model_validate({"steps": 100, "training": fields, "predictor": "secant"} | run), config)


def test_merge_trains_all_parameters_at_one_rate() -> None:
    check("merge", FULL)


@pytest.mark.parametrize("jump", ["swap", "restart"])
def test_the_other_ways_take_all_of_it(jump: str) -> None:
    recovery = {"guards": {"recovery": 5}, "schedule": {"observe": 50, "settle": 5}}
    check(jump, {"lr_scheduler": "cosine"}, save_every=5, **recovery)
    check(jump, FULL)


@pytest.mark.parametrize(
    ("training", "run", "said"),
    [
        ({}, {}, "merge is for full-parameter runs.*use swap or restart"),
        ({**FULL, "lr_scheduler": "cosine"}, {}, "begins the schedule 'cosine' anew"),
        (FULL, {"guards": {"recovery": 5}, "schedule": {"settle": 5}}, "guards.recovery: .*nothing measures accuracy"),
    ],
)
def test_what_merge_cannot_do_is_refused_with_a_way_out(
    training: dict[str, Any], run: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check("merge", training, **run)


@pytest.mark.parametrize("jump", ["restart", "merge"])
def test_a_hundred_restarts_are_refused_with_a_way_out(jump: str) -> None:
    with pytest.raises(ConfigError, match="at each of the 36 jumps of this schedule.*use swap"):
        check(jump, FULL, predictor="auto")
    check("swap", FULL, predictor="auto")


def test_a_merging_run_can_be_resumed(tmp_path: Path) -> None:
    """Going on asks for save_every."""
    check("merge", FULL, save_every=5)

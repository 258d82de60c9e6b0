"""The tables of `auto` beside plain RL, from rows whose figures can be worked out by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("rates")


def row(rate: float, arm: str, bare: float | None, final: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    facts = {
        "task": "arithmetic",
        "learning_rate": rate,
        "seed": seed,
        "arm": arm,
        "before_average": bare,
        "setting": "",
    }
    return facts | {"final": final, "jumps": 3, "factor": None} | more


def rows() -> list[dict[str, Any]]:
    return [
        *(row(1e-4, "plain", 0.5, 0.51, seed, factor=12.8 + seed) for seed in (0, 1)),
        *(row(1e-4, "auto", 0.7, 0.75, seed) for seed in (0, 1)),
        row(1e-3, "plain", 0.8, 0.82),
        row(1e-3, "auto", 0.8, 0.83),
        row(2e-3, "plain", 0.79, 0.84),
        row(1e-3, "linear", None, 0.81),
    ]


def test_every_rate_has_its_plain_run_and_the_advice(rates: Any) -> None:
    small, right = rates.every_rate(rates.by_arm(rows())).splitlines()[2:]
    assert small.startswith("| arithmetic | 0.0001 | 0.500 | 0.510 | 0.750 | +0.250 (+0.250 to +0.250) | +0.240 ")
    assert small.endswith("| 13 | 2 |")
    assert right.endswith("| +0.030 | +0.010 |  | 1 |")


def test_rivals_are_the_best_constant_rate_schedules_and_means(rates: Any) -> None:
    lines = rates.tuned(rates.by_arm(rows())).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        "constant 0.001",
        "linear decay from 0.001",
        "constant 0.002, mean at the end",
    ]
    assert "| -0.050 |" in lines[0]
    assert lines[0].endswith("| +0.030 | 1 |")


def test_what_is_missing_begins_with_the_first_seed_of_everything(rates: Any) -> None:
    wanted = rates.missing(rows(), seeds=2)
    tasks = [seed for _, _, seed, _, setting in wanted if not setting]
    assert tasks == sorted(tasks)
    assert ("arithmetic", 1e-4, 1, "auto", "") not in wanted
    assert ("sorting", 1e-4, 1, "auto", "") in wanted
    assert ("arithmetic", 1e-3, 1, "auto", "LoRA rank 2") in wanted


def test_the_committed_results_make_the_tables(rates: Any) -> None:
    import json

    text = rates.tables(json.loads(rates.FILE.read_text())["rows"])
    assert text.count("| arithmetic |") >= 7

"""The table of `auto` beside plain RL, from rows of before and after the advice was recorded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("rates")


def row(rate: float, arm: str, final: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    facts = {"task": "arithmetic", "learning_rate": rate, "seed": seed, "arm": arm, "final": final}
    return facts | {"jumps": 3, "multiples": {"20": 2.5} if arm == "auto" else {}} | more


def test_the_advice_stands_beside_what_would_have_been_right(rates: Any) -> None:
    rows = [
        *(row(1e-4, "stay", 0.5, seed, factor=12.8 + seed, agreement=0.86) for seed in (0, 1)),
        *(row(1e-4, "auto", 0.7, seed) for seed in (0, 1)),
        row(1e-3, "stay", 0.8),
        row(1e-3, "auto", 0.8),
    ]
    small, right = rates.table(rows).splitlines()[2:]
    assert small.endswith("| 2.5 | 13 | 10 | 2 |")
    assert right.endswith("| 2.5 |  | 1 | 1 |")

"""The picture of README.md shows the committed results."""

from __future__ import annotations

import importlib
import json
import statistics
from typing import Any

import pytest

from tests.docs.blocks import ROOT

pytest.importorskip("matplotlib")


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pictures")


def test_the_committed_picture_is_the_one_the_results_make(pictures: Any) -> None:
    assert pictures.PICTURE.read_text() == pictures.picture().svg(), "make pictures"


def test_its_points_are_the_figures_of_the_table(pictures: Any) -> None:
    found = pictures.by_arm(json.loads(pictures.FILE.read_text())["rows"])
    page = (ROOT / "docs" / "benchmarks" / "auto.md").read_text()
    for task in pictures.TASKS:
        plain = {point.rate: point for point in pictures.line(found, task, "plain", "before_average")}
        for point in pictures.line(found, task, "auto", "final"):
            row = next(line for line in page.splitlines() if line.startswith(f"| {task} | {point.rate:g} |"))
            assert row.startswith(f"| {task} | {point.rate:g} | {plain[point.rate].mean:.3f} |")
            assert f"| {point.mean:.3f} |" in row
            assert row.endswith(f"| {point.seeds} |")
        assert f"| {task} | {pictures.longer(task).mean:.3f} |" in page


def test_what_auto_costs_is_what_the_results_say(pictures: Any) -> None:
    rows = [
        row for row in json.loads(pictures.FILE.read_text())["rows"] if (row["arm"], row["setting"]) == ("auto", "")
    ]
    spent = [row["seconds"] for row in rows]
    shares = sorted(100 * (seconds["ours"] - seconds["ours_probe"]) / seconds["rl"] for seconds in spent)
    said = (
        f"{statistics.median(shares):.0f}% ({shares[0]:.0f} to {shares[-1]:.0f}%), median and range of {len(rows)} runs"
    )
    assert said in (ROOT / "docs" / "why.md").read_text()

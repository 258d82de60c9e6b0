"""The picture of README.md shows the committed results."""

import importlib
import json
import statistics
from typing import Any

import pytest

from tests.docs.blocks import ROOT


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pictures")


def test_the_committed_picture_is_the_one_the_results_make(pictures: Any) -> None:
    assert pictures.PICTURE.read_text() == pictures.picture().svg(pictures.WIDTH), "make pictures"


def test_its_points_are_the_figures_of_the_table(pictures: Any) -> None:
    found = pictures.by_arm(json.loads(pictures.FILE.read_text())["rows"])
    page = (ROOT / "docs" / "benchmarks" / "auto.md").read_text()
    for task in pictures.TASKS:
        plain, jumps = (
            {point.rate: point for point in pictures.line(found, task, arm, figure)}
            for arm, figure in (("plain", "before_average"), ("adaptive-secant", "final"))
        )
        for point in pictures.line(found, task, "auto", "final"):
            row = next(line for line in page.splitlines() if line.startswith(f"| {task} | {point.rate:g} |"))
            assert f", {point.mean:.3f} |" in row
            assert row.endswith(f" {point.seeds} |")
            if point.rate in plain:
                assert row.startswith(f"| {task} | {point.rate:g} | {plain[point.rate].mean:.3f}, ")
            if point.rate in jumps:
                assert f"| {jumps[point.rate].mean:.3f} |" in row
        assert f"| {task} | 0.0001 | {pictures.longer(task).mean:.3f} |" in page


def test_the_readme_has_the_figures_of_the_table(pictures: Any) -> None:
    found = pictures.by_arm(json.loads(pictures.FILE.read_text())["rows"])

    lines = (ROOT / "README.md").read_text().splitlines()
    for rate in (1e-4, 1e-3, 1e-2):
        means = []
        for task in pictures.TASKS:
            rows = found[task, rate, "auto"].values()
            sampled = statistics.mean(row["final"] for row in rows)
            greedy = statistics.mean(row["curve"][-1]["greedy"] for row in rows)
            means.append(f"{sampled:.3f} ({greedy:.3f})".replace("0.", "."))
        assert f"| | `auto` | {' | '.join(means)} |" in lines


@pytest.mark.parametrize(("arm", "digits"), [("auto", 1), ("adaptive-secant", 0)])
def test_what_an_arm_costs_is_what_the_results_say(pictures: Any, arm: str, digits: int) -> None:
    rows = [row for row in json.loads(pictures.FILE.read_text())["rows"] if (row["arm"], row["setting"]) == (arm, "")]
    spent = [row["seconds"] for row in rows]
    shares = sorted(100 * (seconds["ours"] - seconds["ours_probe"]) / seconds["rl"] for seconds in spent)
    middle, low, high = (f"{share:.{digits}f}" for share in (statistics.median(shares), shares[0], shares[-1]))
    assert f"{middle}% ({low} to {high}%, {len(rows)} runs)" in (ROOT / "docs" / "why.md").read_text()

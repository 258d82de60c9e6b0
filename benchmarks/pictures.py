"""The picture of README.md and docs/index.md: accuracy against learning rate, from the committed results; runs nothing.

python benchmarks/pictures.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rates import FILE, STEPS, By, by_arm
from tables import ROOT, half_width
from tasks import RESULTS as TASK_RESULTS
from tasks import TASKS

from next_core.drawing import Axis, Chart, Line, Lines, Panel
from next_core.storage.atomic import write_text

PICTURE = ROOT / "docs" / "images" / "learning-rates.svg"
LINES = {
    "plain RL": ("plain", "before_average", "walk", False),
    "plain RL, mean at the end": ("plain", "final", "c1", True),
    "adaptive-secant": ("adaptive-secant", "final", "c2", False),
    "auto": ("auto", "final", "c0", False),
}
"""By label: arm, figure, colour, and whether it is dashed."""
WIDTH = 940


@dataclass(frozen=True)
class Point:
    """Accuracy over the seeds of one learning rate; ``half`` is half of the 95% interval, None with one seed."""

    rate: float
    mean: float
    half: float | None
    seeds: int


def point(rate: float, values: list[float]) -> Point:
    """The mean and its interval."""
    return Point(rate, statistics.mean(values), half_width(values), len(values))


def line(found: By, task: str, arm: str, figure: str) -> list[Point]:
    """One line of a panel, a point for each learning rate that was run."""
    rates = sorted(rate for of, rate, name in found if (of, name) == (task, arm))
    return [point(rate, [row[figure] for row in found[task, rate, arm].values()]) for rate in rates]


def longer(task: str) -> Point:
    """Plain runs of 400 steps at 1e-4."""
    rows = json.loads(TASK_RESULTS.read_text())["rows"]
    return point(1e-4, [r["curve"][-1] for r in rows if (r["task"], r["learning_rate"]) == (task, 1e-4)])


@dataclass(frozen=True)
class Beside(Chart):
    """Charts side by side, with the legend of the first."""

    charts: Sequence[Chart]

    def keys(self) -> Mapping[str, Mapping[str, Any]]:
        return self.charts[0].keys()

    def paint(self, width: int) -> tuple[float, list[str]]:
        each = width // len(self.charts)
        painted = [chart.paint(each - 12) for chart in self.charts]
        parts = [f'<g transform="translate({each * at} 0)">{"".join(one)}</g>' for at, (_, one) in enumerate(painted)]
        return max(height for height, _ in painted), parts


def panel(found: By, task: str) -> Lines:
    """One task: bands are 95% intervals, hollow dots one seed."""
    lines = []
    for label, (arm, figure, colour, dashed) in LINES.items():
        points = line(found, task, arm, figure)
        rates, means, halves = ([getattr(p, name) or 0.0 for p in points] for name in ("rate", "mean", "half"))
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        lines.append(Line(label, rates, means, low, high, colour, dashed, dots=True))
        alone = [p for p in points if p.half is None]
        hollow = [p.rate for p in alone], [p.mean for p in alone]
        lines.append(Line(label, *hollow, colour="paper", joined=False, dots=True, size=1.5))
    more = longer(task)
    lines.append(Line("plain RL, 400 steps", [more.rate], [more.mean], colour="ink", joined=False, dots=True, size=4))
    axis = Axis(f"{task}: accuracy after {STEPS} RL steps", 0, 1)
    return Lines(task, [Panel(lines, axis)], Axis("learning rate", log=True), height=290)


def picture() -> Beside:
    """What the committed results say."""
    found = by_arm(json.loads(FILE.read_text())["rows"])
    return Beside("learning-rates", [panel(found, task) for task in TASKS])


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    write_text(PICTURE, picture().svg(WIDTH))
    print(PICTURE.relative_to(ROOT))

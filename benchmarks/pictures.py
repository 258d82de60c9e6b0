"""The picture of README.md and docs/index.md: accuracy against learning rate, from the committed results; runs nothing.

python benchmarks/pictures.py
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rates import FILE, STEPS, By, by_arm
from tables import ROOT, half_width
from tasks import RESULTS as TASK_RESULTS
from tasks import TASKS

from next_core.diagnostics.drawing import BLUE, COLOURS, GREY, RED, Drawing, draw
from next_core.storage.atomic import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = ROOT / "docs" / "images" / "learning-rates.svg"
LINES = {
    "plain RL": ("plain", "before_average", GREY, "o", "-", 0.95),
    "plain RL, mean at the end": ("plain", "final", RED, "s", (0, (4, 2)), 1.05),
    "adaptive-secant": ("adaptive-secant", "final", COLOURS[2], "^", "-", 1.0),
    "auto": ("auto", "final", BLUE, "D", "-", 1.0),
}
"""By label: arm, figure, colour, mark, dashes, and how far beside its rate it stands, so that intervals do not hide."""
TICKS = {1e-5: "1e-5", 1e-4: "1e-4", 1e-3: "1e-3", 1e-2: "1e-2", 1e-1: "1e-1"}


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


def paint(picture: Figure, found: By) -> None:
    """A panel for each task, all of one height."""
    panels = picture.subplots(1, len(TASKS), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        for label, (arm, figure, colour, mark, dashes, beside) in LINES.items():
            points = line(found, task, arm, figure)
            at, means = [p.rate * beside for p in points], [p.mean for p in points]
            halves = [p.half or 0.0 for p in points]
            panel.errorbar(
                at, means, halves, color=colour, marker=mark, ms=4, lw=1.6, ls=dashes, capsize=2.5, label=label
            )
            alone = [p for p in points if p.half is None]
            panel.plot(
                [p.rate * beside for p in alone],
                [p.mean for p in alone],
                mark,
                color=colour,
                mfc="white",
                ms=4,
                zorder=5,
            )
        more = longer(task)
        panel.plot([more.rate], [more.mean], "*", color="black", ms=8, label="plain RL, 400 steps")
        panel.errorbar([more.rate], [more.mean], [more.half or 0.0], color="black", lw=1.6)
        panel.set_xscale("log")
        panel.set_xticks(list(TICKS), list(TICKS.values()))
        panel.minorticks_off()
        panel.set_title(task)
        panel.set_xlabel("learning rate")
        panel.grid(axis="y", color="#dddddd", lw=0.6)
    panels[0].set_ylabel(f"accuracy after {STEPS} RL steps")
    handles, labels = panels[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    order = [*LINES, "plain RL, 400 steps"]
    picture.legend([by_label[label] for label in order], order, loc="outside upper left", ncols=len(order))


def picture() -> Drawing:
    """What the committed results say."""
    drawn = draw("learning-rates", (9.0, 3.4), paint, by_arm(json.loads(FILE.read_text())["rows"]))
    assert isinstance(drawn, Drawing)
    return drawn


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    write_text(PICTURE, picture().svg())
    print(PICTURE.relative_to(ROOT))

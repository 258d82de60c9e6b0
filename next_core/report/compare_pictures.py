"""The pictures of a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from next_core.diagnostics.drawing import BLUE, COLOURS, GREY, RED, WIDTH, Drawing, draw, label
from next_core.report.inputs import Arm, Comparison, Curve, Jump, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
ROW = 0.17
"""Inches of one arm's row of jumps."""
Over = Literal["steps", "seconds"]


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every picture."""

    colour: str
    style: Any = "-"


def looks(arms: Mapping[str, Arm]) -> dict[str, Look]:
    """Plain runs in black and grey, the others in the colours, which are used again with dashes."""
    plain = itertools.chain([Look(INK), Look(GREY, STYLES[1])], itertools.repeat(Look(GREY, STYLES[2])))
    others = itertools.cycle([Look(colour, style) for style in STYLES for colour in COLOURS])
    return {name: next(plain) if arm.role == "plain" else next(others) for name, arm in arms.items()}


def draw_curves(comparison: Comparison, over: Over) -> Drawing | str:
    """Accuracy of each arm over RL steps, with the jumps below, or over seconds."""
    return draw(f"curves-over-{over}", (WIDTH, 4.6), _curves, comparison, over)


def draw_differences(comparison: Comparison) -> Drawing | str:
    """A forest plot of the paired differences to plain RL."""
    return draw("differences", (WIDTH, 3.0), _differences, comparison)


def draw_multiples(runs: Mapping[str, Sequence[Sequence[Jump]]]) -> Drawing | str:
    """The multiples that a predictor such as ``auto`` reports, over steps; of each arm by name its runs."""
    return draw("multiples", (WIDTH, 3.4), _multiples, runs)


def _curves(picture: Figure, comparison: Comparison, over: Over) -> str | None:
    known: dict[str, tuple[Curve, Line]] = {}
    for name, arm in comparison.arms.items():
        line = None if arm.curve is None else arm.curve.test.get(comparison.metric)
        if arm.curve is not None and line is not None and any(value is not None for value in line.mean):
            known[name] = arm.curve, line
    if not known:
        return "no arm has accuracies along its way"
    every = looks(comparison.arms)
    jumping = [name for name in known if comparison.arms[name].jump_log] if over == "steps" else []
    rows = -(-len(known) // 2)
    rug = ROW * len(jumping) + 0.25 * bool(jumping)
    picture.set_size_inches(WIDTH, 3.4 + rug + 0.19 * rows + 0.25)
    if jumping:
        axis, ticks = picture.subplots(2, 1, sharex=True, height_ratios=[2.9, rug])
    else:
        axis, ticks = picture.subplots(), None
    for name, (curve, line) in known.items():
        _curve(axis, curve, line, over, every[name])
    axis.set_ylabel(f"test accuracy, {label(comparison.metric)}")
    axis.margins(x=0.01)
    axis.set_xlim(left=0)
    axis.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    if ticks is not None:
        for row, name in enumerate(jumping):
            draw_rug(ticks, row, comparison.arms[name].jump_log, every[name].colour)
        ticks.set(ylim=(len(jumping) - 0.4, -0.6), yticks=[])
        ticks.spines["left"].set_visible(False)
        ticks.set_ylabel("jumps", rotation=0, ha="right", va="center", fontsize=8.5)
    (ticks or axis).set_xlabel("RL steps" if over == "steps" else "seconds of training")
    _legend(picture, sorted(known, key=lambda name: -_last(known[name][1])), every)
    return None


def _curve(axis: Axes, curve: Curve, line: Line, over: Over, look: Look) -> None:
    where = [float(step) for step in curve.steps] if over == "steps" else curve.seconds
    rows = [(x, y, index) for index, (x, y) in enumerate(zip(where, line.mean, strict=True)) if None not in (x, y)]
    x, y, places = zip(*rows, strict=True) if rows else ((), (), ())
    if line.low is not None and line.high is not None:
        ends = [(line.low[index], line.high[index]) for index in places]
        low, high = ([_or_nan(end) for end in side] for side in zip(*ends, strict=True)) if ends else ([], [])
        axis.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    axis.plot(x, y, color=look.colour, linestyle=look.style, linewidth=1.7)


def draw_rug(axis: Axes, row: int, jumps: Sequence[Jump], colour: str) -> None:
    """A tick for each step at which a jump was made, and a small mark below where one was refused."""
    made = {jump.step for jump in jumps if jump.accepted}
    refused = sorted({jump.step for jump in jumps if not jump.accepted} - made)
    axis.vlines(sorted(made), row - 0.36, row + 0.36, color=colour, linewidth=0.9)
    axis.plot(refused, [row] * len(refused), "x", color=colour, markersize=2.6, markeredgewidth=0.7)


def _legend(picture: Figure, names: Sequence[str], every: Mapping[str, Look]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=every[name].colour, linestyle=every[name].style, linewidth=1.7) for name in names]
    words = [label(name) for name in names]
    picture.legend(lines, words, loc="outside lower left", ncols=2, fontsize=8.5)


def _differences(picture: Figure, comparison: Comparison) -> str | None:
    rows = [(name, arm) for name, arm in comparison.arms.items() if arm.difference is not None]
    rows = [(name, arm) for name, arm in rows if arm.role != "plain"]
    if not rows:
        return "no arm has a difference to plain RL"
    picture.set_size_inches(WIDTH, 1.3 + 0.42 * len(rows))
    axis = picture.subplots()
    longer = any(arm.difference_longer is not None for _, arm in rows)
    for row, (_, arm) in enumerate(rows):
        for interval, offset, colour, filled in (
            (arm.difference, -0.14 * longer, BLUE, True),
            (arm.difference_longer, 0.2, RED, False),
        ):
            if interval is None:
                continue
            place = row + offset
            seeds = [value for value in interval.values.values() if value is not None]
            if len(seeds) > 1:
                axis.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=5, alpha=0.45)
            if interval.low is not None and interval.high is not None:
                axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=1.6)
            face = colour if filled else "white"
            axis.plot([interval.mean], [place], "o", color=colour, markerfacecolor=face, markersize=5.5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"difference in test accuracy, {label(comparison.metric)}")
    axis.set_yticks(range(len(rows)), [label(name) for name, _ in rows])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    _marks(picture, comparison, longer)
    return None


def _marks(picture: Figure, comparison: Comparison, longer: bool) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=BLUE, marker="o", markersize=5.5, linewidth=1.6)]
    words = [f"to plain RL, {comparison.steps} steps"]
    if longer:
        marks.append(Line2D([], [], color=RED, marker="o", markerfacecolor="white", markersize=5.5, linewidth=1.6))
        words.append(f"to plain RL, {comparison.longer} steps")
    picture.legend(marks, words, loc="outside lower left", ncols=2, fontsize=8.5)


def _multiples(picture: Figure, runs: Mapping[str, Sequence[Sequence[Jump]]]) -> str | None:
    axis = picture.subplots()
    drawn = 0
    for colour, (name, each) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        words: str | None = label(name)
        for jumps in each:
            points = [(jump.step, jump.diagnostics["multiple"]) for jump in jumps if "multiple" in jump.diagnostics]
            points = [(step, multiple) for step, multiple in points if multiple is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, alpha=0.85, label=words)
                words, drawn = None, drawn + 1
    if not drawn:
        return "no jump reports a multiple"
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="RL step", ylabel="multiple of the observed motion", ylim=(0, None), xlim=(0, None))
    if len(runs) > 1:
        picture.legend(loc="outside lower left", ncols=2, fontsize=8.5)
    return None


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _last(line: Line) -> float:
    return next((value for value in reversed(line.mean) if value is not None), 0.0)

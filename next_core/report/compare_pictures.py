"""The plots of a comparison, and the parts that the plots of a run share with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from next_core.diagnostics.drawing import BLUE, COLOURS, GREY, RED, WIDTH, Drawing, add_grid, add_legend, draw, label
from next_core.report.inputs import Comparison, Curve, Jump, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
DASHED = (0, (5, 1.5))
STYLES = ("-", DASHED, (0, (1.2, 1.2)))
ROW = 0.17
"""Height in inches of one arm's row of jumps."""
Over = Literal["steps", "seconds"]
Look = dict[str, Any]
"""Colour and style of a line."""
X_LABELS = {"steps": "RL steps", "seconds": "seconds of training"}


def draw_curves(comparison: Comparison, over: Over) -> Drawing | str:
    """Draw each arm's accuracy over RL steps, with its jumps below, or over seconds."""
    return draw(f"curves-over-{over}", (WIDTH, 4.6), _curves, comparison, over)


def draw_differences(comparison: Comparison) -> Drawing | str:
    """Draw a forest plot of the paired differences to plain RL."""
    return draw("differences", (WIDTH, 3.0), _differences, comparison)


def draw_multiples(runs: Mapping[str, Sequence[Sequence[Jump]]]) -> Drawing | str:
    """Draw the multiples that a predictor such as ``auto`` reports over steps; ``runs`` holds each arm's seeds."""
    return draw("multiples", (WIDTH, 3.4), _multiples, runs)


def _looks(comparison: Comparison) -> dict[str, Look]:
    """Return plain runs in black and grey, the others in colours, which are reused with dashes."""
    plain = itertools.chain([(INK, "-"), (GREY, STYLES[1])], itertools.repeat((GREY, STYLES[2])))
    others = itertools.cycle([(colour, style) for style in STYLES for colour in COLOURS])
    found = {name: next(plain if arm.role == "plain" else others) for name, arm in comparison.arms.items()}
    return {name: {"color": colour, "linestyle": style, "linewidth": 1.7} for name, (colour, style) in found.items()}


def _curves(picture: Figure, comparison: Comparison, over: Over) -> str | None:
    known: dict[str, tuple[Curve, Line]] = {}
    for name, arm in comparison.arms.items():
        line = None if arm.curve is None else arm.curve.test.get(comparison.metric)
        if arm.curve is not None and line is not None and any(value is not None for value in line.mean):
            known[name] = arm.curve, line
    if not known:
        return "no arm has accuracies along its run"
    looks = _looks(comparison)
    jumping = {name: comparison.arms[name].jump_log for name in known if over == "steps"}
    rows = [(jumps, looks[name]["color"]) for name, jumps in jumping.items() if jumps]
    height = ROW * len(rows) + 0.25 * bool(rows)
    picture.set_size_inches(WIDTH, 3.65 + height + 0.19 * -(-len(known) // 2))
    axis = axes_above_jumps(picture, rows, (2.9, height), X_LABELS[over])
    for name, (curve, line) in known.items():
        _curve(axis, curve, line, over, looks[name])
    axis.set_ylabel(f"test accuracy, {label(comparison.metric)}")
    axis.margins(x=0.01)
    axis.set_xlim(left=0)
    add_legend(picture, {label(name): looks[name] for name in sorted(known, key=lambda name: -_last(known[name][1]))})
    return None


def _curve(axis: Axes, curve: Curve, line: Line, over: Over, look: Look) -> None:
    where = [float(step) for step in curve.steps] if over == "steps" else curve.seconds
    ends = zip(line.low or itertools.repeat(None), line.high or itertools.repeat(None), strict=False)
    points = [
        (x, y, _or_nan(low), _or_nan(high))
        for x, y, (low, high) in zip(where, line.mean, ends, strict=False)
        if x is not None and y is not None
    ]
    if points:
        x, y, low, high = zip(*points, strict=True)
        axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axis.plot(x, y, **look)


def axes_above_jumps(
    picture: Figure, rows: Sequence[tuple[Sequence[Jump], str]], heights: tuple[float, float], x_label: str
) -> Axes:
    """Return axes for a curve. Below them each row shows the jumps made as ticks, and those refused as crosses."""
    if rows:
        axis, below = picture.subplots(2, 1, sharex=True, height_ratios=heights)
        for row, (jumps, colour) in enumerate(rows):
            made = {jump.step for jump in jumps if jump.accepted}
            refused = sorted({jump.step for jump in jumps if not jump.accepted} - made)
            below.vlines(sorted(made), row - 0.36, row + 0.36, color=colour, linewidth=0.9)
            below.plot(refused, [row] * len(refused), "x", color=colour, markersize=2.6, markeredgewidth=0.7)
        below.set(ylim=(len(rows) - 0.4, -0.6), yticks=[])
        below.spines["left"].set_visible(False)
        below.set_ylabel("jumps", rotation=0, ha="right", va="center", fontsize=8.5)
    else:
        axis = below = picture.subplots()
    below.set_xlabel(x_label)
    add_grid(axis)
    return axis  # type: ignore[no-any-return]


def _differences(picture: Figure, comparison: Comparison) -> str | None:
    rows = [(name, arm) for name, arm in comparison.arms.items() if arm.difference is not None and arm.role != "plain"]
    if not rows:
        return "no arm has a difference to plain RL"
    picture.set_size_inches(WIDTH, 1.3 + 0.42 * len(rows))
    axis = picture.subplots()
    longer = any(arm.difference_longer is not None for _, arm in rows)
    for row, (_, arm) in enumerate(rows):
        for interval, place, colour, face in (
            (arm.difference, row - 0.14 * longer, BLUE, BLUE),
            (arm.difference_longer, row + 0.2, RED, "white"),
        ):
            if interval is None:
                continue
            seeds = [value for value in interval.values.values() if value is not None]
            if len(seeds) > 1:
                axis.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=5, alpha=0.45)
            if interval.low is not None and interval.high is not None:
                axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=1.6)
            axis.plot([interval.mean], [place], "o", color=colour, markerfacecolor=face, markersize=5.5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"difference in test accuracy, {label(comparison.metric)}")
    axis.set_yticks(range(len(rows)), [label(name) for name, _ in rows])
    axis.tick_params(axis="y", length=0)
    add_grid(axis, "x")
    mark = {"marker": "o", "markersize": 5.5, "linewidth": 1.6}
    entries = {f"to plain RL, {comparison.steps} steps": {"color": BLUE, **mark}}
    if longer:
        entries[f"to plain RL, {comparison.longer} steps"] = {"color": RED, "markerfacecolor": "white", **mark}
    add_legend(picture, entries)
    return None


def _multiples(picture: Figure, runs: Mapping[str, Sequence[Sequence[Jump]]]) -> str | None:
    axis = picture.subplots()
    entries: dict[str, Look] = {}
    for colour, (name, each) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        for jumps in each:
            points = [(jump.step, jump.diagnostics.get("multiple")) for jump in jumps]
            points = [(step, multiple) for step, multiple in points if multiple is not None]
            if points:
                entries[label(name)] = {"color": colour, "linewidth": 1.3, "alpha": 0.85}
                axis.plot(*zip(*points, strict=True), **entries[label(name)])
    if not entries:
        return "no jump reports a multiple"
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="RL step", ylabel="multiple of the observed update", ylim=(0, None), xlim=(0, None))
    if len(entries) > 1:
        add_legend(picture, entries)
    return None


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _last(line: Line) -> float:
    return next((value for value in reversed(line.mean) if value is not None), 0.0)

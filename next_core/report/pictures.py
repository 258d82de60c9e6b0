"""The plots of a run and of a comparison: functions that fill a picture, or return the reason why they cannot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from next_core.comparison.comparison_results import Curve, Line
from next_core.diagnostics import FIGURES, Analysis
from next_core.diagnostics.backtest_results import Judged
from next_core.diagnostics.drawing import (
    BLUE,
    COLOURS,
    DASHED,
    GREY,
    RED,
    WALK,
    WIDTH,
    Values,
    add_grid,
    add_legend,
    add_line,
    add_row,
    label,
    label_rows,
)
from next_core.diagnostics.plots import Panel, draw_layers
from next_core.report.inputs import Comparison, Jump, Recorded, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
STYLES = ("-", DASHED, (0, (1.2, 1.2)))
ROW = 0.17
"""Height in inches of one arm's row of jumps."""
Over = Literal["steps", "seconds"]
X_LABELS = {"steps": "RL steps", "seconds": "seconds of training"}
SHARES = (
    "squared_energy_ratio_global",
    "squared_energy_ratio_local",
    "energy_ratio_global",
    "energy_ratio_local",
    "c1_r2",
    "top_1_share",
    "line_r2",
    "line_skill",
    "pinned_skill",
    "line_r2_out",
    "cosine_local",
    "straightness",
)
"""Figures that are 1 for a straight line."""
LOWEST = -1.0


def curves(picture: Figure, comparison: Comparison, over: Over) -> str | None:
    """Draw each arm's accuracy over RL steps, with its jumps below, or over seconds."""
    # Plain runs are black and grey, the others coloured; colours are reused with dashes.
    plain = itertools.chain([(INK, "-"), (GREY, DASHED)], itertools.repeat((GREY, STYLES[2])))
    others = itertools.cycle([(colour, style) for style in STYLES for colour in COLOURS])
    looks = {name: next(plain if arm.role == "plain" else others) for name, arm in comparison.arms.items()}
    known: dict[str, tuple[Curve, Line]] = {}
    for name, arm in comparison.arms.items():
        line = None if arm.curve is None else arm.curve.test.get(comparison.metric)
        if arm.curve is not None and line is not None and any(value is not None for value in line.mean):
            known[name] = arm.curve, line
    if not known:
        return "no arm has accuracies along its run"
    rows = [(jumps, looks[name][0]) for name in known if (jumps := comparison.arms[name].jump_log) and over == "steps"]
    picture.set_size_inches(WIDTH, 3.65 + ROW * len(rows) + 0.25 * bool(rows) + 0.19 * -(-len(known) // 2))
    axis = _axes_above_jumps(picture, rows, over, ROW * len(rows) + 0.25)
    for name, (curve, line) in known.items():
        colour, style = looks[name]
        where: Values = curve.steps if over == "steps" else curve.seconds
        add_line(axis, where, line.mean, line.low or (), line.high or (), colour, linestyle=style, linewidth=1.7)
    axis.set_ylabel(f"test accuracy, {label(comparison.metric)}")
    axis.set_xlim(left=0)
    ends = {name: [value for value in line.mean if value is not None][-1] for name, (_, line) in known.items()}
    best_first = sorted(known, key=lambda name: -ends[name])
    add_legend(picture, {label(name): {"color": looks[name][0], "linestyle": looks[name][1]} for name in best_first})
    return None


def progress(picture: Figure, recorded: Recorded, over: Over) -> str | None:
    """Draw test accuracy along the run, and along the plain run with the same seed."""
    plain = [] if recorded.control is None else recorded.control.curve
    if not any(point.test for point in recorded.curve):
        return "no accuracies along the run; measure_every: N in the config measures every N steps"
    axis = _axes_above_jumps(picture, [(recorded.jumps, RED)] if recorded.jumps and over == "steps" else [], over)
    ours = "step scaling" if recorded.scaling else "with jumps"
    for points, colour, run in ((recorded.curve, BLUE, ours), (plain, INK, "plain, same seed")):
        for kind, style in (("sampled", "-"), ("greedy", DASHED)):
            found = [(point.step if over == "steps" else point.seconds, point.test.get(kind)) for point in points]
            known = [(x, y) for x, y in found if x is not None and y is not None]
            if known:
                look: dict[str, Any] = {"linestyle": style, "linewidth": 1.7, "marker": "o", "markersize": 3}
                axis.plot(*zip(*known, strict=True), color=colour, label=f"{run}, {kind}", **look)
    axis.set_ylabel("test accuracy")
    add_legend(picture)
    return None


def reward(picture: Figure, recorded: Recorded) -> str | None:
    """Draw the reward that the trainer logged."""
    logged = {step: numbers["reward"] for step, numbers in recorded.metrics.items() if "reward" in numbers}
    if len(logged) < 2:
        return "metrics.jsonl holds no reward" if recorded.metrics else "there is no metrics.jsonl"
    axis = _axes_above_jumps(picture, [(recorded.jumps, RED)] if recorded.jumps else [], "steps")
    axis.plot(list(logged), list(logged.values()), color=BLUE, linewidth=1.5, marker="o", markersize=2.5)
    axis.set_ylabel("reward of the rollouts")
    return None


def _axes_above_jumps(
    picture: Figure, rows: Sequence[tuple[Sequence[Jump], str]], over: Over, height: float = 0.31
) -> Axes:
    """Return axes for a curve. Below them each row shows the jumps made as ticks, and those refused as crosses."""
    if rows:
        axis, below = picture.subplots(2, 1, sharex=True, height_ratios=(2.9, height))
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
    below.set_xlabel(X_LABELS[over])
    add_grid(axis)
    return axis  # type: ignore[no-any-return]


def differences(picture: Figure, comparison: Comparison) -> str | None:
    """Draw a forest plot of the paired differences to plain RL."""
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
            if interval is not None:
                seeds = [value for value in interval.values.values() if value is not None]
                axis.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=5, alpha=0.45 * (len(seeds) > 1))
                ends = None if interval.low is None or interval.high is None else (interval.low, interval.high)
                add_row(axis, place, interval.mean, ends, color=colour, markerfacecolor=face)
    label_rows(axis, [name for name, _ in rows])
    axis.set_xlabel("difference of accuracy")
    add_grid(axis, "x")
    entries = {f"to plain RL, {comparison.steps} steps": {"color": BLUE, "marker": "o"}}
    if longer:
        entries[f"to plain RL, {comparison.longer} steps"] = {"color": RED, "marker": "o", "markerfacecolor": "white"}
    add_legend(picture, entries)
    return None


def multiples(picture: Figure, runs: Mapping[str, Sequence[Sequence[Jump]]]) -> str | None:
    """Draw the multiples that predictors such as ``adaptive-secant`` report; ``runs`` holds each arm's seeds."""
    axis = picture.subplots()
    entries: dict[str, dict[str, Any]] = {}
    for colour, (name, each) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        for jumps in each:
            points = [(jump.step, multiple) for jump in jumps if (multiple := jump.multiple) is not None]
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


def learning_rate(picture: Figure, scaling: Sequence[Scale]) -> str | None:
    """Draw the learning rate that step scaling chose, with its returns to earlier weights."""
    points = [(one.step, one.rate) for one in scaling if one.rate]
    if not points:
        return "no step was scaled"
    axis = picture.subplots()
    axis.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.7, drawstyle="steps-post", label="learning rate")
    returns = [(one.step, one.rate) for one in scaling if one.back_to is not None and one.rate]
    if returns:
        axis.plot(*zip(*returns, strict=True), color=RED, linestyle="", marker="x", label="return to earlier weights")
        add_legend(picture)
    axis.set(xlabel="RL step", ylabel="learning rate", yscale="log", xlim=(0, None))
    return None


def effects(picture: Figure, jumps: Sequence[Jump]) -> str | None:
    """Draw how much each jump changed the validation accuracy at once."""
    changes = [(jump.step, change, jump.accepted) for jump in jumps if (change := jump.change) is not None]
    if not changes:
        return "no jump was evaluated"
    axis = picture.subplots()
    axis.axhline(0, color="black", linewidth=0.8)
    for outcome, colour, mark in (("made", BLUE, "o"), ("refused", RED, "x")):
        points = [(step, change) for step, change, accepted in changes if accepted == (outcome == "made")]
        if points:
            steps, values = zip(*points, strict=True)
            axis.vlines(steps, 0, values, color=colour, linewidth=1)
            axis.plot(steps, values, mark, color=colour, markersize=4, label=outcome)
    axis.set(xlabel="RL step", ylabel="change of validation accuracy")
    add_grid(axis)
    add_legend(picture)
    return None


def nulls(picture: Figure, analysis: Analysis) -> str | None:
    """Draw the figures of all matrices against their random walks."""
    known = {
        name: figure
        for name in SHARES
        if (figure := analysis.overall.figures.get(name)) is not None and figure.value is not None
    }
    if not known:
        return "no figure could be measured"
    picture.set_size_inches(WIDTH, 1.2 + 0.3 * len(known))
    axis = picture.subplots()
    for row, figure in enumerate(known.values()):
        assert figure.value is not None
        null = figure.null
        if null is not None:
            axis.plot([null.mean] * 2, [row - 0.22, row + 0.22], color=GREY, linewidth=1.5)
        add_row(axis, row, figure.value, figure.quartiles, None if null is None else (null.low, null.high))
    label_rows(axis, [FIGURES[name].heading for name in known])
    # The figures out of sample have no lower bound; what lies below is outside the plot.
    lowest = max(LOWEST, axis.dataLim.x0)
    ending = f"; cut off at {LOWEST:g}" if lowest == LOWEST else ""
    axis.set(xlim=(lowest - 0.02, 1.02), xlabel=f"1 for a straight line{ending}")
    run = {"color": BLUE, "marker": "o", "markersize": 5, "linewidth": 1.5}
    add_legend(picture, {"the run: median, quartiles": run, "random walk: 95%, mean": WALK})
    return None


def skills(picture: Figure, analysis: Analysis, judged: Judged) -> str | None:
    """Draw a predictor's skill by layer and kind of matrix."""
    values = {name: score.skill for name, (score, _) in judged.per_matrix.items()}
    if all(value is None for value in values.values()):
        return "no matrix changed"
    return draw_layers(picture, analysis.matrices, [Panel(f"skill of {label(judged.name)}", values, (-1.0, 1.0))])

"""The charts of a run and of a comparison; where one cannot be drawn, the reason."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from next_core.backend import LoggedReward
from next_core.comparison.comparison_results import Interval
from next_core.cycle.collapse import RewardHistory
from next_core.diagnostics import FIGURES, Analysis
from next_core.diagnostics.backtest_results import Judged
from next_core.diagnostics.plots import layer_maps
from next_core.drawing import Axis, Chart, Dot, Lane, Line, Lines, Panel, Rows
from next_core.drawing.elements import COLOURS, label
from next_core.report.inputs import Arm, Comparison, Jump, Point, Recorded

Over = Literal["steps", "seconds"]
X = {"steps": Axis("RL step", 0), "seconds": Axis("seconds of training, evaluation excluded", 0)}
MOST_POINTS = 50  # A longer log is averaged over neighbouring records
STUDENT = 1.96
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


def learning_curve(recorded: Recorded) -> Chart | str:
    """Draw reward and accuracy; below them, on the same axis, the multiples of the learning rate and the jumps."""
    lines = [*reward_lines(recorded, "reward", "c0"), *_accuracies(recorded)]
    if not lines:
        return "neither reward nor accuracy was logged"
    names = ["reward (95% band)" if line.low else "reward" for line in lines if line.name == "reward"]
    title = " and ".join([*names, "accuracy"] if len(lines) > len(names) else names)
    panels = [Panel(lines, _unit(lines, title), share=2.4)]
    if factors := multiples(recorded, "multiple", "c1"):
        what = "learning rate, times the configured one" if recorded.scaling else "multiple that a jump aims at"
        panels.append(Panel(factors, Axis(what, log=True), rule=1))
    return Lines("learning-curve", panels, X["steps"], _lanes(recorded), 300 + 110 * (len(panels) - 1))


def curves_of(runs: Mapping[str, Recorded]) -> Chart | str:
    """Draw the rewards, accuracies and multiples of several runs over each other."""
    looks = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    rewards = [line for name, run in runs.items() for line in reward_lines(run, name, looks[name])]
    points = [(name, by) for name, run in runs.items() if len(by := _milestones(run)) > 1]
    measured = [Line(name, list(by), list(by.values()), colour=looks[name], dots=True) for name, by in points]
    factors = [line for name, run in runs.items() for line in multiples(run, name, looks[name])]
    panels = [Panel(rewards, _unit(rewards, "reward (95% band)"), share=1.6)] if rewards else []
    panels += [Panel(measured, _unit(measured, "test accuracy"), share=1.6)] if measured else []
    panels += [Panel(factors, Axis("multiple of the learning rate, or of a jump", log=True), rule=1)] if factors else []
    lanes = [Lane(name, *_jump_steps(run.jumps), looks[name]) for name, run in runs.items() if run.jumps]
    size = 120 + 170 * len(panels)
    return Lines("learning-curves", panels, X["steps"], lanes, size) if panels else "nothing was logged"


def reward_lines(recorded: Recorded, name: str, colour: str) -> list[Line]:
    """Return the logged reward with the 95% interval of its sampling error, where rollouts are known; or nothing.

    A record covers the steps since the one before. Its error is that of a mean of as many rollouts, widened because
    those of one prompt succeed together (``clustering``).
    """
    rewards = [(step, numbers) for step, numbers in recorded.metrics.items() if "reward" in numbers]
    if len(rewards) < 2:
        return []
    history, logged = RewardHistory(), list[LoggedReward]()
    for (step, numbers), (before, _) in zip(rewards, [(0, {}), *rewards], strict=False):
        steps, spread = max(step - before, 1), numbers.get("reward_std", math.nan)
        error = spread / math.sqrt((recorded.rollouts or math.nan) * steps)
        logged.append(LoggedReward(step, steps, numbers["reward"], error))
        history.add(logged[-1])
    size = math.ceil(len(logged) / MOST_POINTS)
    parts = [logged[first : first + size] for first in range(0, len(logged), size)]
    totals = [sum(one.steps for one in part) for part in parts]
    y = [sum(one.mean * one.steps for one in part) / total for part, total in zip(parts, totals, strict=True)]
    width = STUDENT * math.sqrt(history.clustering(len(logged)))
    half = [
        width * math.hypot(*(one.error * one.steps for one in part)) / n for part, n in zip(parts, totals, strict=True)
    ]
    band = not math.isnan(sum(half))
    low, high = ([mean + sign * one for mean, one in zip(y, half, strict=True)] if band else () for sign in (-1, 1))
    return [Line(name, [part[-1].step for part in parts], y, low, high, colour, dots=len(parts) <= 30)]


def multiples(recorded: Recorded, name: str, colour: str) -> list[Line]:
    """Return the multiples that step scaling or jumps such as those of ``adaptive-secant`` chose; or nothing."""
    points: list[tuple[float, float]] = [(jump.step, jump.multiple) for jump in recorded.jumps if jump.multiple]
    scaled = [(one.step, one.multiple) for one in recorded.scaling]
    if scaled:
        points = [(0, 1.0), *scaled, (recorded.last_step, scaled[-1][1])]
    x, y = [step for step, _ in points], [multiple for _, multiple in points]
    return [Line(name, x, y, colour=colour, stepped=bool(scaled), dots=not scaled)] if points else []


def _accuracies(recorded: Recorded) -> list[Line]:
    """Return test accuracies along the run and its plain run, and those of the probe on the validation prompts."""
    plain = [] if recorded.control is None else recorded.control.curve
    name = "plain run, same seed"
    found = [*_by_kind(recorded.curve, "test accuracy", "c2"), *_by_kind(plain, name, "soft")]
    if not found and (known := _milestones(recorded)):
        found.append(Line("test accuracy", list(known), list(known.values()), colour="c2", dots=True))
        if recorded.control is not None and (end := recorded.control.accuracy.get("final")) is not None and 0 in known:
            steps, ends = [0, recorded.control.steps], [known[0], end]
            found.append(Line(name, steps, ends, colour="soft", dashed=True, dots=True))
    if probes := recorded.probes:
        found.append(Line("validation accuracy", list(probes), list(probes.values()), colour="c3", dots=True))
    return found


def _by_kind(points: Sequence[Point], name: str, colour: str, over: Over = "steps") -> list[Line]:
    kinds = list(dict.fromkeys(kind for point in points for kind in point.test))
    x = [point.step if over == "steps" else point.seconds for point in points]
    by = {kind: [point.test.get(kind) for point in points] for kind in kinds}
    return [Line(f"{name}, {kind}", x, y, colour=colour, dashed=kind != kinds[0], dots=True) for kind, y in by.items()]


def over_seconds(recorded: Recorded) -> Chart | str:
    plain = [] if recorded.control is None else recorded.control.curve
    lines = [*_by_kind(recorded.curve, "this run", "c2", "seconds"), *_by_kind(plain, "plain run", "soft", "seconds")]
    if not any(line.points() for line in lines):
        return "measure_every: N in the config measures it every N steps"
    return Lines("accuracy-over-seconds", [Panel(lines, _unit(lines, "test accuracy"))], X["seconds"], height=280)


def _milestones(recorded: Recorded) -> dict[float, float]:
    """Return test accuracies by step: those along the run where there are any, else those at its milestones."""
    curve = [(point.step, next(iter(point.test.values()), None)) for point in recorded.curve]
    tested = [(one["step"], one.get("value")) for one in recorded.events if one["event"] == "accuracy"]
    return {step: value for step, value in curve or tested if value is not None}


def _unit(lines: Iterable[Line], title: str) -> Axis:
    """Return an axis from 0 to 1 for rewards and accuracies within; noise would look like a crash if it filled one."""
    values = [value for line in lines for value in line.y if value is not None]
    return Axis(title, 0, 1) if values and min(values) >= 0 and 0.05 < max(values) <= 1 else Axis(title)


def _jump_steps(jumps: Sequence[Jump]) -> tuple[list[float], list[float]]:
    made = sorted({float(jump.step) for jump in jumps if jump.accepted})
    return made, sorted({float(jump.step) for jump in jumps} - set(made))


def _lanes(recorded: Recorded) -> list[Lane]:
    lanes = [Lane("jumps", *_jump_steps(recorded.jumps))] if recorded.jumps else []
    back = [one.step for one in recorded.scaling if one.back_to is not None]
    return [*lanes, *([Lane("returns", [], back, "c1")] if back else [])]


def compared(comparison: Comparison, over: Over) -> Chart | str:
    """Draw each arm's accuracy over RL steps, with its jumps below, or over seconds. Two seeds are two lines."""
    looks = arm_looks(comparison.arms)
    lines, lanes = list[Line](), list[Lane]()
    for name, arm in comparison.arms.items():
        line = None if arm.curve is None else arm.curve.test.get(comparison.metric)
        if arm.curve is None or line is None:
            continue
        x = arm.curve.steps if over == "steps" else arm.curve.seconds
        colour, dashed = looks[name]
        if len(line.values) == 2:
            lines += [Line(label(name), x, y, colour=colour, dashed=dashed) for y in line.values.values()]
        else:
            lines.append(Line(label(name), x, line.mean, line.low or (), line.high or (), colour, dashed))
        if arm.tries and over == "steps":
            lanes.append(Lane(name, *_jump_steps(arm.jump_log), colour))
    if not any(line.points() for line in lines):
        return "no arm has accuracies along its run"
    panel = Panel(lines, _unit(lines, f"test accuracy, {comparison.metric}"))
    return Lines(f"curves-over-{over}", [panel], X[over], lanes, 330)


def arm_looks(arms: Mapping[str, Arm]) -> dict[str, tuple[str, bool]]:
    """Return colour and dashes: plain runs are grey, controls dashed, others have colours of their own, up to six."""
    plain = itertools.chain([("ink", False), ("walk", False)], itertools.repeat(("walk", True)))
    others = itertools.cycle(COLOURS)
    return {n: next(plain) if arm.role == "plain" else (next(others), arm.role == "control") for n, arm in arms.items()}


def differences(comparison: Comparison) -> Chart | str:
    """Draw a forest plot of the paired differences to plain RL."""
    rows = {}
    for name, arm in comparison.arms.items():
        if arm.difference is not None and arm.role != "plain":
            known = [(arm.difference, "c0"), (arm.difference_longer, "c1")]
            rows[name] = [_dot(interval, colour) for interval, colour in known if interval is not None]
    if not rows:
        return "no arm has a difference to plain RL"
    words = {f"to plain RL, {comparison.steps} steps": "c0"}
    words |= {f"to plain RL, {comparison.longer} steps": "c1"} if any(len(dots) > 1 for dots in rows.values()) else {}
    return Rows("differences", rows, Axis(f"difference of {comparison.metric} accuracy"), legend=words)


def _dot(interval: Interval, colour: str) -> Dot:
    ends = None if interval.low is None or interval.high is None else (interval.low, interval.high)
    seeds = [value for value in interval.values.values() if value is not None]
    return Dot(interval.mean, ends, seeds if len(seeds) > 1 else (), colour)


def arm_multiples(arms: Mapping[str, Arm]) -> Chart | str:
    """Draw the multiples that predictors such as ``adaptive-secant`` report; one line for each seed."""
    looks, lines = arm_looks(arms), list[Line]()
    for name, arm in arms.items():
        for jumps in arm.jumps.values():
            if points := [(jump.step, jump.multiple) for jump in jumps if jump.multiple]:
                steps, values = zip(*points, strict=True)
                lines.append(Line(label(name), steps, values, colour=looks[name][0], dashed=looks[name][1]))
    panel = Panel(lines, Axis("multiple of the observed update", log=True), rule=1)
    return Lines("multiples", [panel], X["steps"], height=240) if lines else "no jump reports a multiple"


def against_walks(analysis: Analysis) -> Chart | str:
    figures = {name: analysis.overall.figures.get(name) for name in SHARES}
    known = {FIGURES[name].heading: one for name, one in figures.items() if one is not None and one.value is not None}
    rows = {name: [Dot(one.value or 0.0, one.quartiles)] for name, one in known.items()}
    walks = {name: (one.null.low, one.null.mean, one.null.high) for name, one in known.items() if one.null is not None}
    shown = [x for dots in rows.values() for dot in dots for x in (dot.value, *(dot.ends or ()))]
    lowest = min([*shown, *(walk[0] for walk in walks.values())], default=0.0)
    cut = "; lower values are drawn at −1" if lowest < -1 else ""
    axis = Axis(f"1 for a straight line{cut}", max(-1.0, min(lowest, -0.05)), 1)
    legend = {"the run: median, quartiles": "c0", "random walk: 95%, mean": "walk"}
    return Rows("figures", rows, axis, walks, legend) if rows else "no figure could be measured"


def skill_by_layer(analysis: Analysis, judged: Judged) -> Chart | str:
    values = {name: score.skill for name, (score, _) in judged.per_matrix.items()}
    return layer_maps("skill-by-layer", analysis.matrices, {f"skill of {label(judged.name)}": values})

"""The plots of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from next_core.diagnostics import FIGURES, Analysis
from next_core.diagnostics.backtest_results import Judged
from next_core.diagnostics.drawing import BLUE, GREY, RED, WIDTH, Drawing, add_grid, add_legend, draw, label
from next_core.diagnostics.plots import Panel, draw_layers
from next_core.report.compare_pictures import DASHED, INK, X_LABELS, Look, Over, axes_above_jumps
from next_core.report.inputs import Jump, Recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
WALK: Look = {"color": GREY, "linewidth": 7, "alpha": 0.4}
HEIGHTS = (2.8, 0.3)
"""Relative heights of a curve and of the row of jumps below it."""


def draw_progress(recorded: Recorded, over: Over) -> Drawing | str:
    """Draw test accuracy along the run, and along the plain run with the same seed."""
    return draw(f"accuracy-over-{over}", (WIDTH, 4.3), _progress, recorded, over)


def draw_reward(recorded: Recorded) -> Drawing | str:
    """Draw the reward that the trainer logged."""
    return draw("reward", (WIDTH, 3.9), _reward, recorded)


def draw_effects(jumps: Sequence[Jump]) -> Drawing | str:
    """Draw how much each jump changed the validation accuracy at once."""
    return draw("jump-effects", (WIDTH, 3.4), _effects, jumps)


def draw_nulls(analysis: Analysis) -> Drawing | str:
    """Draw the figures of all matrices against their random walks."""
    return draw("figures", (WIDTH, 4.4), _nulls, analysis)


def draw_skills(analysis: Analysis, judged: Judged) -> Drawing | str:
    """Draw a predictor's skill by layer and kind of matrix."""
    return draw("skill-by-layer", (WIDTH, 3.4), _skills, analysis, judged)


def _progress(picture: Figure, recorded: Recorded, over: Over) -> str | None:
    control = recorded.result.control if recorded.result is not None else None
    plain = [] if control is None else control.curve
    if not any(point.test for point in recorded.curve):
        return "no accuracies along the run; measure_every: N in the config measures every N steps"
    rows = [(recorded.jumps, RED)] if recorded.jumps and over == "steps" else []
    axis = axes_above_jumps(picture, rows, HEIGHTS, X_LABELS[over])
    for points, colour, run in ((recorded.curve, BLUE, "with jumps"), (plain, INK, "plain, same seed")):
        for kind, style in (("sampled", "-"), ("greedy", DASHED)):
            found = [(point.step if over == "steps" else point.seconds, point.test.get(kind)) for point in points]
            known = [(x, y) for x, y in found if x is not None and y is not None]
            if known:
                look: Look = {"color": colour, "linestyle": style, "linewidth": 1.7, "marker": "o", "markersize": 3}
                axis.plot(*zip(*known, strict=True), label=f"{run}, {kind}", **look)
    axis.set_ylabel("test accuracy")
    add_legend(picture)
    return None


def _reward(picture: Figure, recorded: Recorded) -> str | None:
    logged = {step: numbers["reward"] for step, numbers in recorded.metrics.items() if "reward" in numbers}
    if len(logged) < 2:
        return "metrics.jsonl holds no reward" if recorded.metrics else "there is no metrics.jsonl"
    axis = axes_above_jumps(picture, [(recorded.jumps, RED)] if recorded.jumps else [], HEIGHTS, X_LABELS["steps"])
    axis.plot(list(logged), list(logged.values()), color=BLUE, linewidth=1.5, marker="o", markersize=2.5)
    axis.set_ylabel("reward of the rollouts")
    return None


def _effects(picture: Figure, jumps: Sequence[Jump]) -> str | None:
    changes = [
        (jump.step, jump.accuracy_after - jump.accuracy_before, jump.accepted)
        for jump in jumps
        if jump.accuracy_before is not None and jump.accuracy_after is not None
    ]
    if not changes:
        return "no jump was evaluated"
    axis = picture.subplots()
    axis.axhline(0, color="black", linewidth=0.8)
    made = [(step, change) for step, change, accepted in changes if accepted]
    refused = [(step, change) for step, change, accepted in changes if not accepted]
    if made:
        x, y = zip(*made, strict=True)
        axis.vlines(x, 0, y, color=BLUE, linewidth=1)
        axis.plot(x, y, "o", color=BLUE, markersize=4, label="made")
    if refused:
        axis.plot(*zip(*refused, strict=True), "x", color=RED, markersize=5, label="refused")
    axis.set(xlabel="RL step", ylabel="change of validation accuracy")
    add_grid(axis)
    if made and refused:
        add_legend(picture)
    return None


def _nulls(picture: Figure, analysis: Analysis) -> str | None:
    figures = {name: analysis.overall.figures[name] for name in SHARES if name in analysis.overall.figures}
    known = {name: figure for name, figure in figures.items() if figure.value is not None}
    if not known:
        return "no figure could be measured"
    picture.set_size_inches(WIDTH, 1.2 + 0.3 * len(known))
    axis = picture.subplots()
    clipped = False

    def clip(*values: float) -> list[float]:
        nonlocal clipped
        clipped |= min(values) < LOWEST
        return [max(value, LOWEST) for value in values]

    for row, figure in enumerate(known.values()):
        assert figure.value is not None
        if figure.null is not None:
            axis.plot(clip(figure.null.low, figure.null.high), [row, row], **WALK, solid_capstyle="butt")
            axis.plot(clip(figure.null.mean) * 2, [row - 0.22, row + 0.22], color=GREY, linewidth=1.5)
        if figure.quartiles is not None:
            axis.plot(clip(*figure.quartiles), [row, row], color=BLUE, linewidth=1.4)
        axis.plot(clip(figure.value), [row], "o", color=BLUE, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    ending = f"; values below {LOWEST:g} are clipped" if clipped else ""
    axis.set(ylim=(len(known) - 0.5, -0.5), xlim=(None, 1.02), xlabel=f"1 for a straight line{ending}")
    axis.set_yticks(range(len(known)), [FIGURES[name].heading for name in known])
    axis.tick_params(axis="y", length=0)
    run = {"color": BLUE, "marker": "o", "markersize": 5, "linewidth": 1.4}
    add_legend(picture, {"the run: median, quartiles": run, "random walk: 95%, mean": WALK})
    return None


def _skills(picture: Figure, analysis: Analysis, judged: Judged) -> str | None:
    values = {name: score.skill for name, (score, _) in judged.per_matrix.items()}
    if all(value is None for value in values.values()):
        return "no matrix changed"
    return draw_layers(
        picture, analysis.matrices, [Panel(f"skill of {label(judged.name)}", values, between=(-1.0, 1.0))]
    )

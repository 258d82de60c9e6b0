"""The pictures of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from next_core.diagnostics import FIGURES, Analysis
from next_core.diagnostics.backtest_results import Judged
from next_core.diagnostics.drawing import BLUE, GREY, RED, WIDTH, Drawing, draw, label
from next_core.diagnostics.plots import Panel, draw_layers
from next_core.report.compare_pictures import INK, Over, draw_rug
from next_core.report.inputs import Jump, Point, Recorded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BESIDE_NULLS = (
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
"""Figures that a straight line has at 1."""
LOWEST = -1.0
SMALL = 0.3
"""Inches of the row of jumps below a curve."""


def draw_progress(recorded: Recorded, over: Over) -> Drawing | str:
    """Test accuracy along the run, and along the plain run of the same seed."""
    return draw(f"accuracy-over-{over}", (WIDTH, 4.3), _progress, recorded, over)


def draw_reward(recorded: Recorded) -> Drawing | str:
    """The reward that the trainer logged."""
    return draw("reward", (WIDTH, 3.9), _reward, recorded)


def draw_effects(jumps: Sequence[Jump]) -> Drawing | str:
    """What each jump did to the probe's accuracy at once."""
    return draw("jump-effects", (WIDTH, 3.4), _effects, jumps)


def draw_beside_nulls(analysis: Analysis) -> Drawing | str:
    """The figures of all matrices, each beside its random walk."""
    return draw("figures", (WIDTH, 4.4), _beside_nulls, analysis)


def draw_skills(analysis: Analysis, judged: Judged) -> Drawing | str:
    """A predictor's skill by layer and kind of matrix."""
    return draw("skill-by-layer", (WIDTH, 3.4), _skills, analysis, judged)


def _progress(picture: Figure, recorded: Recorded, over: Over) -> str | None:
    control = recorded.result.control if recorded.result is not None else None
    plain = [] if control is None else control.curve
    if not any(point.test for point in recorded.curve):
        return "no accuracies along the run; measure_every: N in the config measures every N steps"
    axis, rug = _axes(picture, recorded.jumps if over == "steps" else [])
    for points, colour, whose in ((recorded.curve, BLUE, "with jumps"), (plain, INK, "plain, same seed")):
        for way, style in (("sampled", "-"), ("greedy", (0, (5, 1.5)))):
            x, y = _points(points, way, over)
            if y:
                words = f"{whose}, {way}"
                axis.plot(x, y, color=colour, linestyle=style, linewidth=1.7, marker="o", markersize=3, label=words)
    axis.set_ylabel("test accuracy")
    (rug or axis).set_xlabel("RL steps" if over == "steps" else "seconds of training")
    picture.legend(loc="outside lower left", ncols=2, fontsize=8.5)
    return None


def _points(points: Sequence[Point], way: str, over: Over) -> tuple[list[float], list[float]]:
    rows = [(point.step if over == "steps" else point.seconds, point.test.get(way)) for point in points]
    known = [(x, y) for x, y in rows if x is not None and y is not None]
    return [float(x) for x, _ in known], [y for _, y in known]


def _reward(picture: Figure, recorded: Recorded) -> str | None:
    logged = {step: numbers["reward"] for step, numbers in recorded.metrics.items() if "reward" in numbers}
    if len(logged) < 2:
        return "metrics.jsonl holds no reward" if recorded.metrics else "there is no metrics.jsonl"
    axis, rug = _axes(picture, recorded.jumps)
    axis.plot(list(logged), list(logged.values()), color=BLUE, linewidth=1.5, marker="o", markersize=2.5)
    axis.set_ylabel("reward of the roll-outs")
    (rug or axis).set_xlabel("RL steps")
    return None


def _axes(picture: Figure, jumps: Sequence[Jump]) -> tuple[Axes, Axes | None]:
    """Where a curve goes, and below it the jumps, if there are any."""
    rug: Axes | None = None
    if jumps:
        axis, rug = picture.subplots(2, 1, sharex=True, height_ratios=[2.8, SMALL])
        draw_rug(rug, 0, jumps, RED)
        rug.set(ylim=(0.7, -0.7), yticks=[])
        rug.spines["left"].set_visible(False)
        rug.set_ylabel("jumps", rotation=0, ha="right", va="center", fontsize=8.5)
    else:
        axis = picture.subplots()
    axis.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    return axis, rug


def _effects(picture: Figure, jumps: Sequence[Jump]) -> str | None:
    probed = [
        (jump, jump.accuracy_after - jump.accuracy_before)
        for jump in jumps
        if jump.accuracy_before is not None and jump.accuracy_after is not None
    ]
    if not probed:
        return "no jump was probed"
    axis = picture.subplots()
    axis.axhline(0, color="black", linewidth=0.8)
    made = [(jump.step, change) for jump, change in probed if jump.accepted]
    back = [(jump.step, change) for jump, change in probed if not jump.accepted]
    if made:
        x, y = zip(*made, strict=True)
        axis.vlines(x, 0, y, color=BLUE, linewidth=1)
        axis.plot(x, y, "o", color=BLUE, markersize=4, label="made")
    if back:
        x, y = zip(*back, strict=True)
        axis.plot(x, y, "x", color=RED, markersize=5, label="refused")
    axis.set(xlabel="RL step", ylabel="change of validation accuracy")
    axis.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    if made and back:
        picture.legend(loc="outside lower left", ncols=2, fontsize=8.5)
    return None


def _beside_nulls(picture: Figure, analysis: Analysis) -> str | None:
    figures = [(name, analysis.overall.figures[name]) for name in BESIDE_NULLS if name in analysis.overall.figures]
    known = [(name, figure) for name, figure in figures if figure.value is not None]
    if not known:
        return "no figure could be measured"
    picture.set_size_inches(WIDTH, 1.2 + 0.3 * len(known))
    axis = picture.subplots()
    for row, (_, figure) in enumerate(known):
        assert figure.value is not None
        if figure.null is not None:
            low, high = max(figure.null.low, LOWEST), max(figure.null.high, LOWEST)
            middle = max(figure.null.mean, LOWEST)
            axis.plot([low, high], [row, row], color=GREY, linewidth=7, alpha=0.4, solid_capstyle="butt")
            axis.plot([middle, middle], [row - 0.22, row + 0.22], color=GREY, linewidth=1.5)
        if figure.quartiles is not None:
            axis.plot([max(end, LOWEST) for end in figure.quartiles], [row, row], color=BLUE, linewidth=1.4)
        axis.plot([max(figure.value, LOWEST)], [row], "o", color=BLUE, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    cut = [one for _, one in known for x in (one.value, one.null.low if one.null else None) if x and x < LOWEST]
    ending = f"; what lies below {LOWEST:g} is drawn there" if cut else ""
    axis.set(ylim=(len(known) - 0.5, -0.5), xlim=(None, 1.02), xlabel=f"a straight line has 1{ending}")
    axis.set_yticks(range(len(known)), [FIGURES[name].heading for name, _ in known])
    axis.tick_params(axis="y", length=0)
    _explain(picture)
    return None


def _explain(picture: Figure) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=BLUE, marker="o", markersize=5, linewidth=1.4),
        Line2D([], [], color=GREY, linewidth=7, alpha=0.4),
    ]
    words = ["the run: median, quartiles", "random walk: 95%, mean"]
    picture.legend(lines, words, loc="outside lower left", ncols=2, fontsize=8.5)


def _skills(picture: Figure, analysis: Analysis, judged: Judged) -> str | None:
    values = {name: score.skill for name, (score, _) in judged.per_matrix.items()}
    if all(value is None for value in values.values()):
        return "no matrix moved"
    return draw_layers(picture, analysis, [Panel(f"skill of {label(judged.name)}", values, between=(-1.0, 1.0))])

"""The analysis as plots, PNG and SVG. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from next_core.diagnostics.drawing import (
    BLUE,
    DASHED,
    GREY,
    RED,
    WIDTH,
    Drawing,
    add_legend,
    add_line,
    check_drawing,
    draw,
    label,
)
from next_core.diagnostics.figures import Group, Null, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

LOWEST_SKILL = -2.0
KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The order of a transformer block; other kinds follow by name."""
NO_NULL = Null(math.nan, math.nan, math.nan)
MOST_NUMBERED = 14
"""With more layers a map shows colours without numbers."""
PICTURES = ("energy-ratios", "skill", "displacement", "layers")


def draw_analysis(
    overall: Group, matrices: Mapping[str, Group], missing: Mapping[str, str]
) -> dict[str, Drawing | str]:
    """Return each of ``PICTURES``, or why it was not drawn. Raises ``ConfigError`` without matplotlib."""
    check_drawing()
    return {
        "energy-ratios": draw("energy-ratios", (WIDTH, 5.8), _energy, overall),
        "skill": draw("skill", (WIDTH, 4.2), _skill, overall, missing),
        "displacement": draw("displacement", (WIDTH, 4.2), _displacement, overall, missing),
        "layers": draw("layers", (WIDTH, 6.0), _map, overall, matrices, missing),
    }


def write_plots(drawn: Mapping[str, Drawing | str], folder: Path) -> dict[str, str]:
    """Write each plot as PNG and SVG into ``folder``, atomically. Raises as ``check_drawing``.

    Returns the path of each PNG, or why the plot was not drawn.
    """
    check_drawing(folder)
    return {
        name: f"not drawn: {one}" if isinstance(one, str) else str(one.write(folder)) for name, one in drawn.items()
    }


def _energy(picture: Picture, overall: Group) -> str | None:
    words = {
        "squared_energy_ratio": "σ₁² / Σσ², share of the energy",
        "energy_ratio": "σ₁ / Σσ, not squared (NExt)",
    }
    figures = [figure for figure in words if _known(overall.series.get(f"{figure}_global"))]
    if not figures:
        return "no energy ratios"
    picture.set_size_inches(WIDTH, 0.6 + 2.6 * len(figures))
    axes = picture.subplots(len(figures), 1, sharex=True, squeeze=False)[:, 0]
    for axis, figure in zip(axes, figures, strict=True):
        _plot(axis, overall.series[f"{figure}_global"], BLUE)
        _plot(axis, overall.series[f"{figure}_local"], RED)
        axis.set(title=words[figure], ylim=(0, 1), xlim=(0, None))
    axes[-1].set_xlabel("RL step")
    _explain(picture, overall, {"global: since the start": BLUE, "local: each interval": RED})
    return None


def _skill(picture: Picture, overall: Group, missing: Mapping[str, str]) -> str | None:
    if not _known(overall.series.get("line_skill")):
        return missing.get("line_skill", "no out-of-sample figures")
    axis = picture.subplots()
    _plot(axis, overall.series["pinned_skill"], BLUE)
    _plot(axis, overall.series["line_skill"], RED)
    axis.axhline(0, color="black", linewidth=0.8)
    lowest = max(LOWEST_SKILL, min(-0.1, axis.dataLim.y0) * 1.05)
    axis.set(ylim=(lowest, 1), xlabel="horizon, RL steps ahead", ylabel="skill, 1 - SSE / SSE of staying put")
    axis.text(1.005, 0, "staying put", transform=axis.get_yaxis_transform(), va="center", fontsize=8.5)
    cut = f"; cut at {LOWEST_SKILL:g}" if lowest == LOWEST_SKILL else ""
    axis.set_title(f"Out of sample: fit up to t, predict t + horizon{cut}")
    _explain(picture, overall, {"slope put at the newest point": BLUE, "fitted line": RED})
    return None


def _displacement(picture: Picture, overall: Group, missing: Mapping[str, str]) -> str | None:
    from matplotlib.ticker import LogLocator, NullLocator

    msd = overall.series.get("msd")
    if msd is None or not _known(msd):
        return missing.get("msd_exponent", "no displacement over time")
    axis = picture.subplots()
    for slope, words in ((1, "slope 1: random walk"), (2, "slope 2: straight line")):
        y = [(x / msd.x[0]) ** slope for x in msd.x]
        axis.plot(msd.x, y, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(words, (msd.x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    _plot(axis, msd, BLUE, GREY)
    axis.set(xscale="log", yscale="log", xlabel="lag, RL steps", ylabel="mean squared displacement / first lag's")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_minor_locator(NullLocator())
        ticks.set_major_formatter("{x:g}")
    exponent = overall.value("msd_exponent")
    axis.set_title("Displacement" if exponent is None else f"Displacement grows with exponent {exponent:.2f} (median)")
    _explain(picture, overall, {"the run": BLUE})
    return None


def _map(picture: Picture, overall: Group, matrices: Mapping[str, Group], missing: Mapping[str, str]) -> str | None:
    panels = []
    for figure, words in (
        ("squared_energy_ratio_global", "σ₁² / Σσ² of the newest global delta"),
        ("cosine_local", "cosine of successive local deltas"),
    ):
        if figure not in missing:
            null = overall.figures[figure].null
            walk = "" if null is None else f" (random walk: {round(null.mean, 2) + 0.0:.2f})"
            panels.append(Panel(words + walk, {name: group.value(figure) for name, group in matrices.items()}))
    return draw_layers(picture, matrices, panels) if panels else "neither energy ratios nor cosines"


class Panel(NamedTuple):
    """One map of ``draw_layers``: a value for each matrix by name, None where there is none.

    ``between`` are the ends of the colours; None takes them from the values.
    """

    title: str
    values: Mapping[str, float | None]
    between: tuple[float, float] | None = None


def draw_layers(picture: Picture, matrices: Mapping[str, Group], panels: Sequence[Panel]) -> str | None:
    """Draw maps of layers (columns) by kinds of matrices (rows), one below the other; or say why there are none."""
    layered = [group for group in matrices.values() if group.layer is not None]
    layers = sorted({group.layer for group in layered if group.layer is not None})
    order = {kind: place for place, kind in enumerate(KIND_ORDER)}
    kinds = sorted({group.kind or "" for group in layered}, key=lambda kind: (order.get(kind, len(order)), kind))
    if not layers:
        return "names tell no layers, as model.layers.12.self_attn.q_proj.weight does"
    picture.set_size_inches(max(WIDTH, 2.2 + 0.34 * len(layers)), len(panels) * (1.0 + 0.3 * len(kinds)) + 0.4)
    axes = picture.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        places: dict[tuple[int | None, str | None], list[float]] = defaultdict(list)
        for name, group in matrices.items():
            if (value := panel.values.get(name)) is not None:
                places[group.layer, group.kind].append(value)
        cells = [[statistics.fmean(places.get((x, kind)) or [math.nan]) for x in layers] for kind in kinds]
        shown = [x for row in cells for x in row if not math.isnan(x)]
        low, high = panel.between or (math.floor(10 * min(shown)) / 10, math.ceil(10 * max(shown)) / 10)
        image = axis.pcolormesh(
            cells, cmap="cividis", vmin=low, vmax=max(high, low + 0.2), edgecolors="white", linewidth=1.5
        )
        for row, values in enumerate(cells if len(layers) <= MOST_NUMBERED else ()):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    ink = "white" if value < (high + low) / 2 else "black"
                    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
                    axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=ink)
        axis.invert_yaxis()
        axis.set_yticks([row + 0.5 for row in range(len(kinds))], [label(kind) for kind in kinds])
        ticks = range(0, len(layers), 1 if len(layers) <= 30 else 5)
        axis.set_xticks([column + 0.5 for column in ticks], [str(layers[column]) for column in ticks])
        axis.set_title(panel.title)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        picture.colorbar(image, ax=axis, fraction=0.03, pad=0.01).outline.set_visible(False)
    axes[-1].set_xlabel("layer")
    return None


def _plot(axis: Axes, series: Series, colour: str, null_colour: str | None = None) -> None:
    """Plot the median over matrices with their quartiles as a band, and the null dashed with its interval."""
    add_line(axis, series.x, series.value, series.low, series.high, colour, linewidth=1.8, marker="o", markersize=3.5)
    if series.null is not None:
        mean, low, high = zip(*(astuple(one or NO_NULL) for one in series.null), strict=True)
        add_line(axis, series.x, mean, low, high, null_colour or colour, band=0.12, linewidth=1.2, linestyle=DASHED)


def _explain(picture: Picture, overall: Group, lines: Mapping[str, str]) -> None:
    """Say below the axes what the lines and bands are."""
    entries = {words: {"color": colour, "linewidth": 1.8, "marker": "o"} for words, colour in lines.items()}
    entries["random walk, mean and 95%"] = {"color": GREY, "linewidth": 1.2, "linestyle": DASHED}
    count = len(overall.members)
    if count > 1:
        entries[f"median and quartiles of {count} matrices"] = {"color": GREY, "linewidth": 7, "alpha": 0.3}
    add_legend(picture, entries)


def _known(series: Series | None) -> bool:
    return series is not None and any(value is not None for value in series.value)

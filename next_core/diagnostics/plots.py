"""The analysis as pictures, PNG and SVG. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_core.diagnostics.analysis_results import Analysis, Null, Series
from next_core.diagnostics.drawing import BLUE, GREY, RED, WIDTH, Drawing, add_legend, check_drawing, draw, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

LOWEST_SKILL = -2.0
KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The order of a transformer block; other kinds follow by name."""
DASHES = (0, (4, 2))
NO_NULL = Null(math.nan, math.nan, math.nan)
MOST_NUMBERED = 14
"""With more layers a map shows colours without numbers."""


def draw_analysis(analysis: Analysis) -> dict[str, Drawing | str]:
    """Return each picture, or why it was not drawn. Raises ``PluginError`` without matplotlib."""
    check_drawing()
    return {name: draw(name, size, paint, analysis) for name, (size, paint) in PICTURES.items()}


def write_plots(analysis: Analysis, folder: Path) -> dict[str, str]:
    """Write each picture as PNG and SVG into ``folder``, atomically. Raises as ``check_drawing``.

    Returns per picture its PNG's path, or why it was not drawn.
    """
    check_drawing(folder)
    drawn = draw_analysis(analysis)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: f"not drawn: {one}" if isinstance(one, str) else str(one.write(folder)) for name, one in drawn.items()
    }


def _energy(picture: Picture, analysis: Analysis) -> str | None:
    series = analysis.overall.series
    words = {
        "squared_energy_ratio": "σ₁² / Σσ², share of the energy",
        "energy_ratio": "σ₁ / Σσ, not squared (NExt)",
    }
    figures = [figure for figure in words if _known(series.get(f"{figure}_global"))]
    if not figures:
        return "no energy ratios"
    picture.set_size_inches(WIDTH, 0.6 + 2.6 * len(figures))
    axes = picture.subplots(len(figures), 1, sharex=True, squeeze=False)[:, 0]
    for axis, figure in zip(axes, figures, strict=True):
        _plot(axis, series[f"{figure}_global"], BLUE)
        _plot(axis, series[f"{figure}_local"], RED)
        axis.set(title=words[figure], ylim=(0, 1), xlim=(0, None))
    axes[-1].set_xlabel("RL step")
    _explain(picture, analysis, {"global: since the start": BLUE, "local: each interval": RED})
    return None


def _skill(picture: Picture, analysis: Analysis) -> str | None:
    series = analysis.overall.series
    if not _known(series.get("line_skill")):
        return analysis.missing.get("line_skill", "no out-of-sample figures")
    axis, drawn = picture.subplots(), [series["pinned_skill"], series["line_skill"]]
    for one, colour in zip(drawn, (BLUE, RED), strict=True):
        _plot(axis, one, colour)
    shown = [x for one in drawn for x in (*one.value, *one.low) if x is not None]
    shown += [null.low for one in drawn for null in one.null or () if null is not None]
    lowest = max(LOWEST_SKILL, min([-0.1, *shown]) * 1.05)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylim=(lowest, 1), xlabel="horizon, RL steps ahead", ylabel="skill, 1 - SSE / SSE of staying put")
    place = axis.get_yaxis_transform()  # across the axes, and at zero skill
    axis.text(1.005, 0, "staying put", transform=place, va="center", fontsize=8.5)
    cut = f"; cut at {LOWEST_SKILL:g}" if lowest == LOWEST_SKILL else ""
    axis.set_title(f"Out of sample: fit up to t, predict t + horizon{cut}")
    _explain(picture, analysis, {"slope put at the newest point": BLUE, "fitted line": RED})
    return None


def _displacement(picture: Picture, analysis: Analysis) -> str | None:
    msd = analysis.overall.series.get("msd")
    if msd is None or not _known(msd):
        return analysis.missing.get("msd_exponent", "no displacement over time")
    axis = picture.subplots()
    for slope, words in ((1, "slope 1: random walk"), (2, "slope 2: straight line")):
        y = [(x / msd.x[0]) ** slope for x in msd.x]
        axis.plot(msd.x, y, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(words, (msd.x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    _plot(axis, msd, BLUE, GREY)
    axis.set(xscale="log", yscale="log", xlabel="lag, RL steps", ylabel="mean squared displacement / first lag's")
    exponent = analysis.overall.figures["msd_exponent"].value
    axis.set_title("Displacement" if exponent is None else f"Displacement grows with exponent {exponent:.2f} (median)")
    lags: list[int] = []
    for lag in msd.x:
        if not lags or lag >= 1.25 * lags[-1]:  # labels that do not touch
            lags.append(lag)
    axis.set_xticks(lags, [str(lag) for lag in lags])
    ticks = [x * 10**power for power in range(7) for x in (1, 2, 5) if x * 10**power <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    _explain(picture, analysis, {"the run": BLUE})
    return None


def _map(picture: Picture, analysis: Analysis) -> str | None:
    panels = []
    for figure, words in (
        ("squared_energy_ratio_global", "σ₁² / Σσ² of the newest global delta"),
        ("cosine_local", "cosine of successive local deltas"),
    ):
        if figure not in analysis.missing:
            null = analysis.overall.figures[figure].null
            walk = "" if null is None else f" (random walk: {round(null.mean, 2) + 0.0:.2f})"
            values = {name: group.value(figure) for name, group in analysis.matrices.items()}
            panels.append(Panel(words + walk, values))
    return draw_layers(picture, analysis, panels) if panels else "neither energy ratios nor cosines"


@dataclass(frozen=True)
class Panel:
    """One map of ``draw_layers``: a value for each matrix by name, None where there is none.

    ``between`` are the ends of the colours; None takes them from the values.
    """

    title: str
    values: Mapping[str, float | None]
    between: tuple[float, float] | None = None


def draw_layers(picture: Picture, analysis: Analysis, panels: Sequence[Panel]) -> str | None:
    """Draw maps of layers (columns) by kinds of matrices (rows), one below the other; or say why there are none."""
    layers = list(analysis.layers)
    order = {kind: place for place, kind in enumerate(KIND_ORDER)}
    known = {group.kind or "" for group in analysis.matrices.values() if group.layer is not None}
    kinds = sorted(known, key=lambda kind: (order.get(kind, len(order)), kind))
    if not layers or not kinds:
        return "names tell no layers, as model.layers.12.self_attn.q_proj.weight does"
    picture.set_size_inches(max(WIDTH, 2.2 + 0.34 * len(layers)), len(panels) * (1.0 + 0.3 * len(kinds)) + 0.4)
    axes = picture.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        places: dict[tuple[int | None, str | None], list[float]] = defaultdict(list)
        for name, group in analysis.matrices.items():
            if (value := panel.values.get(name)) is not None:
                places[group.layer, group.kind].append(value)
        cells = [[statistics.fmean(places.get((x, kind)) or [math.nan]) for x in layers] for kind in kinds]
        shown = [x for row in cells for x in row if not math.isnan(x)]
        low, high = panel.between or (math.floor(10 * min(shown)) / 10, math.ceil(10 * max(shown)) / 10)
        image = axis.imshow(cells, aspect="auto", cmap="cividis", vmin=low, vmax=max(high, low + 0.2))
        if len(layers) <= MOST_NUMBERED:
            for row, values in enumerate(cells):
                for column, value in enumerate(values):
                    if not math.isnan(value):
                        ink = "white" if value < (high + low) / 2 else "black"
                        text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
                        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
        for edge in range(1, len(kinds)):
            axis.axhline(edge - 0.5, color="white", linewidth=1.5)
        for edge in range(1, len(layers)):
            axis.axvline(edge - 0.5, color="white", linewidth=1.5)
        ticks = range(0, len(layers), 1 if len(layers) <= 30 else 5)
        axis.set_xticks(ticks, [str(layers[index]) for index in ticks])
        axis.set_title(panel.title)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        picture.colorbar(image, ax=axis, fraction=0.03, pad=0.01).outline.set_visible(False)
    axes[-1].set_xlabel("layer")
    return None


PICTURES: dict[str, tuple[tuple[float, float], Callable[[Any, Analysis], str | None]]] = {
    "energy-ratios": ((WIDTH, 5.8), _energy),
    "skill": ((WIDTH, 4.2), _skill),
    "displacement": ((WIDTH, 4.2), _displacement),
    "layers": ((WIDTH, 6.0), _map),
}


def _plot(axis: Axes, series: Series, colour: str, null_colour: str | None = None) -> None:
    """Plot the median over matrices with their quartiles as a band, and the null dashed with its interval."""
    value, low, high = (_gaps(each) for each in (series.value, series.low, series.high))
    axis.fill_between(series.x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(series.x, value, color=colour, linewidth=1.8, marker="o", markersize=3.5)
    if series.null is not None:
        nulls, tint = [null or NO_NULL for null in series.null], null_colour or colour
        low, high = [null.low for null in nulls], [null.high for null in nulls]
        axis.fill_between(series.x, low, high, color=tint, alpha=0.12, linewidth=0)
        axis.plot(series.x, [null.mean for null in nulls], color=tint, linewidth=1.2, linestyle=DASHES, alpha=0.9)


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Return NaN where there is no value: matplotlib leaves a gap there."""
    return [math.nan if value is None else value for value in values]


def _explain(picture: Picture, analysis: Analysis, lines: Mapping[str, str]) -> None:
    """Say below the axes what the lines and bands are."""
    entries = {words: {"color": colour, "linewidth": 1.8, "marker": "o"} for words, colour in lines.items()}
    entries["random walk, mean and 95%"] = {"color": GREY, "linewidth": 1.2, "linestyle": DASHES}
    count = len(analysis.overall.members)
    if count > 1:
        entries[f"median and quartiles of {count} matrices"] = {"color": GREY, "linewidth": 7, "alpha": 0.3}
    add_legend(picture, entries)


def _known(series: Series | None) -> bool:
    return series is not None and any(value is not None for value in series.value)

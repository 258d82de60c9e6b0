"""The analysis as pictures, PNG and SVG. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_core.diagnostics.analysis_results import Analysis, Series
from next_core.diagnostics.drawing import BLUE, GREY, RED, WIDTH, Drawing, check_drawing, draw, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

LOWEST_SKILL = -2.0
KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WALK = "random walk, mean and 95%"
NO_LAYERS = "no names such as model.layers.12.self_attn.q_proj.weight, which tell layers"
MOST_NUMBERED = 14
"""Of more layers a map shows colours alone."""


def draw_analysis(analysis: Analysis) -> dict[str, Drawing | str]:
    """Each picture, or why it was not drawn. Raises ``PluginError`` without matplotlib."""
    check_drawing()
    return {name: draw(name, size, paint, analysis) for name, (size, paint) in PICTURES.items()}


def write_plots(analysis: Analysis, folder: Path) -> dict[str, str]:
    """Write each picture as PNG and SVG into ``folder`` (made if need be), each file whole or not at all.

    Returns per picture its PNG's path, or why it was not drawn. Raises as ``check_drawing``.
    """
    check_drawing(folder)
    drawn = draw_analysis(analysis)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: f"not drawn: {one}" if isinstance(one, str) else str(one.write(folder)) for name, one in drawn.items()
    }


def _energy(picture: Picture, analysis: Analysis) -> str | None:
    series = analysis.overall.series
    panels = [
        (figure, words)
        for figure, words in (
            ("squared_energy_ratio", "σ₁² / Σσ², share of the energy"),
            ("energy_ratio", "σ₁ / Σσ, not squared (NExt)"),
        )
        if _known(series.get(f"{figure}_global"))
    ]
    if not panels:
        return "no energy ratios"
    picture.set_size_inches(WIDTH, 0.6 + 2.6 * len(panels))
    axes = picture.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (figure, words) in zip(axes, panels, strict=True):
        for kind, colour, meaning in (
            ("global", BLUE, "global: since the start"),
            ("local", RED, "local: each interval"),
        ):
            _null(axis, series[f"{figure}_{kind}"], colour)
            _line(axis, series[f"{figure}_{kind}"], colour, meaning)
        axis.set(title=words, ylim=(0, 1), xlim=(0, None))
    axes[-1].set_xlabel("RL step")
    _legend_below(picture, axes[0])
    _say(picture, analysis)
    return None


def _skill(picture: Picture, analysis: Analysis) -> str | None:
    series = analysis.overall.series
    if not _known(series.get("line_skill")):
        return analysis.missing.get("line_skill", "no out-of-sample figures")
    axis = picture.subplots()
    drawn = (("pinned_skill", BLUE, "slope put at the newest point"), ("line_skill", RED, "fitted line"))
    for name, colour, words in drawn:
        _null(axis, series[name], colour)
        _line(axis, series[name], colour, words)
    values = [x for name, *_ in drawn for x in (*series[name].value, *series[name].low) if x is not None]
    values += [one.low for name, *_ in drawn for one in series[name].null or () if one is not None]
    axis.axhline(0, color="black", linewidth=0.8)
    lowest = max(LOWEST_SKILL, min([*values, -0.1]) * 1.05)
    axis.set(ylim=(lowest, 1), xlabel="horizon, RL steps ahead", ylabel="skill, 1 - SSE / SSE of staying put")
    place = axis.get_yaxis_transform()  # across the axes, and at zero skill
    axis.text(1.005, 0, "staying put", transform=place, va="center", fontsize=8.5)
    cut = f"; cut at {LOWEST_SKILL:g}" if lowest == LOWEST_SKILL else ""
    axis.set_title(f"Out of sample: fit up to t, predict t + horizon{cut}")
    _legend_below(picture, axis)
    _say(picture, analysis)
    return None


def _displacement(picture: Picture, analysis: Analysis) -> str | None:
    msd = analysis.overall.series.get("msd")
    if not _known(msd):
        return analysis.missing.get("msd_exponent", "no displacement over time")
    assert msd is not None
    axis = picture.subplots()
    for slope, words in ((1, "slope 1: random walk"), (2, "slope 2: straight line")):
        y = [(x / msd.x[0]) ** slope for x in msd.x]
        axis.plot(msd.x, y, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(words, (msd.x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    _null(axis, msd, GREY)
    _line(axis, msd, BLUE, "the run")
    axis.set(
        xscale="log", yscale="log", xlabel="lag, RL steps", ylabel="mean squared displacement / that of the first lag"
    )
    exponent = analysis.overall.figures["msd_exponent"].value
    axis.set_title("Displacement" if exponent is None else f"Displacement grows with exponent {exponent:.2f} (median)")
    axis.set_xticks(_thinned(msd.x), [str(x) for x in _thinned(msd.x)])
    ticks = [x for power in range(7) for x in (10**power, 2 * 10**power, 5 * 10**power)]
    shown = [x for x in ticks if x <= axis.get_ylim()[1]]
    axis.set_yticks(shown, [f"{x:g}" for x in shown])
    axis.minorticks_off()
    axis.legend(*_with_null(axis), loc="upper left", fontsize=8.5)
    _say(picture, analysis)
    return None


def _map(picture: Picture, analysis: Analysis) -> str | None:
    panels = []
    for figure, words in (
        ("squared_energy_ratio_global", "σ₁² / Σσ² of the newest global delta"),
        ("cosine_local", "cosine of successive local deltas"),
    ):
        if figure in analysis.missing:
            continue
        null = analysis.overall.figures[figure].null
        values = {name: group.value(figure) for name, group in analysis.matrices.items()}
        walk = "" if null is None else f" (random walk: {round(null.mean, 2) + 0.0:.2f})"
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
    """Maps of layers (columns) by kinds of matrices (rows), one below the other; or why there are none."""
    layers, kinds = list(analysis.layers), _kinds_in_layers(analysis)
    if not layers or not kinds:
        return NO_LAYERS
    picture.set_size_inches(max(WIDTH, 2.2 + 0.34 * len(layers)), len(panels) * (1.0 + 0.3 * len(kinds)) + 0.4)
    axes = picture.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        cells = _cells(analysis, layers, kinds, panel.values)
        known = [x for row in cells for x in row if x is not None]
        low, high = panel.between or (math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10)
        numbers = [[math.nan if x is None else x for x in row] for row in cells]
        shown = axis.imshow(numbers, aspect="auto", cmap="cividis", vmin=low, vmax=max(high, low + 0.2))
        if len(layers) <= MOST_NUMBERED:
            for row, values in enumerate(cells):
                for column, value in enumerate(values):
                    if value is not None:
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
        picture.colorbar(shown, ax=axis, fraction=0.03, pad=0.01).outline.set_visible(False)
    axes[-1].set_xlabel("layer")
    return None


PICTURES: dict[str, tuple[tuple[float, float], Callable[[Any, Analysis], str | None]]] = {
    "energy-ratios": ((WIDTH, 5.8), _energy),
    "skill": ((WIDTH, 4.2), _skill),
    "displacement": ((WIDTH, 4.2), _displacement),
    "layers": ((WIDTH, 6.0), _map),
}


def _line(axis: Axes, series: Series, colour: str, words: str) -> None:
    """The median over matrices, and their quartiles as a band."""
    x, y, low, high = _columns(series.x, series.value, series.low, series.high)
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=words)


def _null(axis: Axes, series: Series, colour: str) -> None:
    if series.null is None:
        return
    known = [(x, *vars(one).values()) for x, one in zip(series.x, series.null, strict=True) if one is not None]
    if known:
        x, mean, low, high = (list(column) for column in zip(*known, strict=True))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.plot(x, mean, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.9)


def _legend_below(picture: Picture, axis: Axes) -> None:
    picture.legend(*_with_null(axis), loc="outside lower left", ncols=2, fontsize=8.5)


def _with_null(axis: Axes) -> tuple[list[Any], list[str]]:
    """The legend's lines and words, the null's dashes once."""
    from matplotlib.lines import Line2D

    handles, labels = axis.get_legend_handles_labels()
    dashes = Line2D([], [], color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
    return [*handles, dashes], [*labels, WALK]


def _say(picture: Picture, analysis: Analysis) -> None:
    count = len(analysis.overall.members)
    words = f"median over {count} matrices, band: quartiles" if count > 1 else "one matrix"
    picture.supxlabel(words, fontsize=8, color="#555555", x=0.99, ha="right")


def _columns(x: Sequence[int], *columns: Sequence[float | None]) -> tuple[list[float], ...]:
    """Without the places where the first column is None."""
    rows = [row for row in zip(x, *columns, strict=True) if row[1] is not None]
    return tuple(
        [float("nan") if value is None else float(value) for value in column] for column in zip(*rows, strict=True)
    )


def _known(series: Series | None) -> bool:
    return series is not None and any(value is not None for value in series.value)


def _thinned(x: Sequence[int]) -> list[int]:
    """Ticks that do not touch on a logarithmic axis."""
    kept = [x[0]]
    for value in x[1:]:
        if value >= 1.25 * kept[-1]:
            kept.append(value)
    return kept


def _kinds_in_layers(analysis: Analysis) -> list[str]:
    """In the order of a transformer block, others after by name."""
    known = {group.kind or "" for group in analysis.matrices.values() if group.layer is not None}
    order = {kind: place for place, kind in enumerate(KIND_ORDER)}
    return sorted(known, key=lambda kind: (order.get(kind, len(order)), kind))


def _cells(
    analysis: Analysis, layers: list[int], kinds: list[str], each: Mapping[str, float | None]
) -> list[list[float | None]]:
    """One value for each kind (row) and layer; the mean where several matrices share a place."""
    places: dict[tuple[int | None, str | None], list[float]] = {}
    for name, group in analysis.matrices.items():
        value = each.get(name)
        if value is not None:
            places.setdefault((group.layer, group.kind), []).append(value)

    def mean(values: Sequence[float] | None) -> float | None:
        return sum(values) / len(values) if values else None

    return [[mean(places.get((layer, kind))) for layer in layers] for kind in kinds]

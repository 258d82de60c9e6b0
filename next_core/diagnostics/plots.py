"""The analysis as pictures, PNG and SVG. Needs matplotlib: the extra ``report``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_core.diagnostics.results import Analysis, Group, Series
from next_core.errors import ConfigError, PluginError
from next_core.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's colours, which the colour-blind tell apart; nulls are grey.
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "next-core",
    "svg.fonttype": "none",
}
FORMATS = ("png", "svg")
LOWEST_SKILL = -2.0
KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WALK = "random walk, mean and 95%"


def check_plots(folder: Path) -> None:
    """Raise what ``write_plots`` would: ``PluginError`` without matplotlib, ``ConfigError`` if ``folder`` is a file."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PluginError(f"plots need matplotlib ({error}); pip install next-core[report]") from error
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the plots")


def write_plots(analysis: Analysis, folder: Path) -> dict[str, str]:
    """Write each picture as PNG and SVG into ``folder`` (made if need be), each file whole or not at all.

    Returns per picture its PNG's path, or why it was not drawn. Raises as ``check_plots``.
    """
    check_plots(folder)
    import matplotlib as mpl
    from matplotlib.figure import Figure as Picture

    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, str] = {}
    with mpl.rc_context(STYLE):
        for name, (size, draw) in PICTURES.items():
            picture = Picture(figsize=size, layout="constrained")
            reason = draw(picture, analysis)
            if reason is not None:
                told[name] = f"not drawn: {reason}"
                continue
            for kind in FORMATS:
                metadata = {"Date": None} if kind == "svg" else {}
                with atomic_file(folder / f"{name}.{kind}") as scratch:
                    picture.savefig(scratch, format=kind, dpi=160, metadata=metadata)
            told[name] = str(folder / f"{name}.png")
    return told


def _energy(picture: Picture, analysis: Analysis) -> str | None:
    series = analysis.overall.series
    panels = [
        (figure, words)
        for figure, words in (
            ("squared_energy_ratio", r"$\sigma_1^2\,/\,\sum\sigma^2$, share of the energy"),
            ("energy_ratio", r"$\sigma_1\,/\,\sum\sigma$, not squared (NExt)"),
        )
        if _known(series.get(f"{figure}_global"))
    ]
    if not panels:
        return "no energy ratios"
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (figure, words) in zip(axes, panels, strict=True):
        for kind, colour, label in (
            ("global", BLUE, "global: since the start"),
            ("local", RED, "local: each interval"),
        ):
            _null(axis, series[f"{figure}_{kind}"], colour)
            _line(axis, series[f"{figure}_{kind}"], colour, label)
        axis.set(title=words, xlabel="RL step", ylim=(0, 1), xlim=(0, None))
    axes[0].set_ylabel("first singular triplet's share")
    axes[0].legend(*_with_null(axes[0]), loc="upper left", fontsize=8.5)
    _say(picture, analysis)
    return None


def _skill(picture: Picture, analysis: Analysis) -> str | None:
    series = analysis.overall.series
    if not _known(series.get("line_skill")):
        return analysis.missing.get("line_skill", "no out-of-sample figures")
    axis = picture.subplots()
    drawn = (("pinned_skill", BLUE, "slope put at the newest point"), ("line_skill", RED, "fitted line"))
    for name, colour, label in drawn:
        _null(axis, series[name], colour)
        _line(axis, series[name], colour, label)
    values = [x for name, *_ in drawn for x in (*series[name].value, *series[name].low) if x is not None]
    values += [one.low for name, *_ in drawn for one in series[name].null or () if one is not None]
    axis.axhline(0, color="black", linewidth=0.8)
    lowest = max(LOWEST_SKILL, min([*values, -0.1]) * 1.05)
    axis.set(ylim=(lowest, 1), xlabel="horizon, RL steps ahead", ylabel="skill, 1 - SSE / SSE of staying put")
    place = axis.get_yaxis_transform()  # across the axes, and at zero skill
    axis.text(1.005, 0, "staying put", transform=place, va="center", fontsize=8.5)
    cut = f"; cut at {LOWEST_SKILL:g}" if lowest == LOWEST_SKILL else ""
    axis.set_title(f"Out of sample: fit up to t, predict t + horizon{cut}")
    axis.legend(*_with_null(axis), loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8.5)
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
    layers, kinds = list(analysis.layers), _kinds_in_layers(analysis)
    if not layers or not kinds:
        return "no names such as model.layers.12.self_attn.q_proj.weight, which tell layers"
    panels = [
        (figure, words)
        for figure, words in (
            ("squared_energy_ratio_global", r"$\sigma_1^2/\sum\sigma^2$ of the newest global delta"),
            ("cosine_local", "cosine of successive local deltas"),
        )
        if figure not in analysis.missing
    ]
    if not panels:
        return "neither energy ratios nor cosines"
    picture.set_size_inches(max(5.5, 2.2 + 0.34 * len(layers)), len(panels) * (1.0 + 0.3 * len(kinds)) + 0.4)
    axes = picture.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (figure, words) in zip(axes, panels, strict=True):
        cells = _cells(analysis, layers, kinds, figure)
        known = [x for row in cells for x in row if x is not None]
        low, high = math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10
        numbers = [[math.nan if x is None else x for x in row] for row in cells]
        shown = axis.imshow(numbers, aspect="auto", cmap="cividis", vmin=low, vmax=max(high, low + 0.2))
        if len(layers) <= 14:
            for row, values in enumerate(cells):
                for column, value in enumerate(values):
                    if value is not None:
                        ink = "white" if value < (high + low) / 2 else "black"
                        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set_yticks(range(len(kinds)), kinds)
        for edge in range(1, len(kinds)):
            axis.axhline(edge - 0.5, color="white", linewidth=1.5)
        for edge in range(1, len(layers)):
            axis.axvline(edge - 0.5, color="white", linewidth=1.5)
        ticks = range(0, len(layers), 1 if len(layers) <= 30 else 5)
        axis.set_xticks(ticks, [str(layers[index]) for index in ticks])
        null = analysis.overall.figures[figure].null
        axis.set_title(words if null is None else f"{words} (random walk: {null.mean:.2f})")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        picture.colorbar(shown, ax=axis, fraction=0.03, pad=0.01).outline.set_visible(False)
    axes[-1].set_xlabel("layer")
    return None


PICTURES: dict[str, tuple[tuple[float, float], Callable[[Any, Analysis], str | None]]] = {
    "energy-ratios": ((8.2, 3.9), _energy),
    "skill": ((7.6, 3.9), _skill),
    "displacement": ((6.4, 4.2), _displacement),
    "layers": ((7.0, 6.0), _map),
}


def _line(axis: Axes, series: Series, colour: str, label: str) -> None:
    """The median over matrices, and their quartiles as a band."""
    x, y, low, high = _columns(series.x, series.value, series.low, series.high)
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)


def _null(axis: Axes, series: Series, colour: str) -> None:
    if series.null is None:
        return
    known = [(x, *vars(one).values()) for x, one in zip(series.x, series.null, strict=True) if one is not None]
    if known:
        x, mean, low, high = (list(column) for column in zip(*known, strict=True))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.plot(x, mean, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.9)


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


def _cells(analysis: Analysis, layers: list[int], kinds: list[str], figure: str) -> list[list[float | None]]:
    """One value for each kind (row) and layer; the mean where several matrices share a place."""
    places: dict[tuple[int | None, str | None], list[Group]] = {}
    for group in analysis.matrices.values():
        places.setdefault((group.layer, group.kind), []).append(group)

    def mean(groups: Sequence[Group]) -> float | None:
        known = [value for group in groups if (value := group.value(figure)) is not None]
        return sum(known) / len(known) if known else None

    return [[mean(places.get((layer, kind), [])) for layer in layers] for kind in kinds]

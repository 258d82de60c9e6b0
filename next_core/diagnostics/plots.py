"""The charts of an analysis."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from next_core.diagnostics.figures import Group, Series
from next_core.drawing import Axis, Chart, Line, Lines, Maps, Panel
from next_core.storage.atomic import check_can_be_folder

LOWEST_SKILL = -2.0
PICTURES = ("energy-ratios", "skill", "displacement", "layers")
MAPPED = {
    "squared_energy_ratio_global": "σ₁²/Σσ², newest global delta",
    "cosine_local": "cosine of successive local deltas",
}


def draw_analysis(overall: Group, matrices: Mapping[str, Group], missing: Mapping[str, str]) -> dict[str, Chart | str]:
    """Return each of ``PICTURES``, or why it was not drawn."""
    return {
        "energy-ratios": _energy(overall),
        "skill": _skill(overall, missing),
        "displacement": _displacement(overall, missing),
        "layers": _maps(overall, matrices, missing),
    }


def write_plots(drawn: Mapping[str, Chart | str], folder: Path) -> dict[str, str]:
    """Write charts as SVG; return their paths, or why they were not drawn. ``ConfigError`` if ``folder`` is a file."""
    check_can_be_folder(folder)
    return {name: f"not drawn: {x}" if isinstance(x, str) else str(x.write(folder)) for name, x in drawn.items()}


def _energy(overall: Group) -> Chart | str:
    words = {"squared_energy_ratio": "σ₁² / Σσ², share of the energy", "energy_ratio": "σ₁ / Σσ, not squared (NExt)"}
    panels = []
    for figure, title in words.items():
        if _known(overall.series.get(f"{figure}_global")):
            lines = _lines(overall, f"{figure}_global", "since the start", "c0")
            lines += _lines(overall, f"{figure}_local", "in each interval", "c1")
            panels.append(Panel(lines, Axis(title, 0, 1)))
    if not panels:
        return "no energy ratios"
    return Lines("energy-ratios", panels, Axis("RL step", 0), height=220 * len(panels))


def _skill(overall: Group, missing: Mapping[str, str]) -> Chart | str:
    if not _known(overall.series.get("line_skill")):
        return missing.get("line_skill", "no out-of-sample figures")
    lines = _lines(overall, "pinned_skill", "slope put at the newest point", "c0")
    lines += _lines(overall, "line_skill", "fitted line", "c1")
    least = min((value for line in lines for value in (*line.y, *line.low) if value is not None), default=0.0)
    cut = f"; cut at {LOWEST_SKILL:g}" if least < LOWEST_SKILL else ""
    axis = Axis(f"skill: 1 exact, 0 staying put{cut}", max(LOWEST_SKILL, min(least, -0.1)), 1)
    return Lines("skill", [Panel(lines, axis, rule=0)], Axis("horizon, RL steps ahead"))


def _displacement(overall: Group, missing: Mapping[str, str]) -> Chart | str:
    msd = overall.series.get("msd")
    if msd is None or not _known(msd):
        return missing.get("msd_exponent", "no displacement over time")
    guides = [
        Line(words, msd.x, [(x / msd.x[0]) ** slope for x in msd.x], colour="soft", dashed=True)
        for slope, words in ((1, "slope 1: random walk"), (2, "slope 2: straight line"))
    ]
    axis = Axis("mean squared displacement / first lag's", log=True)
    panel = Panel([*guides, *_lines(overall, "msd", "the run", "c0")], axis)
    return Lines("displacement", [panel], Axis("lag, RL steps", log=True))


def _maps(overall: Group, matrices: Mapping[str, Group], missing: Mapping[str, str]) -> Chart | str:
    maps = {}
    for figure, words in MAPPED.items():
        if figure not in missing:
            null = overall.figures[figure].null
            walk = "" if null is None else f"; random walk {round(null.mean, 2) + 0.0:.2f}"
            maps[words + walk] = {name: group.value(figure) for name, group in matrices.items()}
    return layer_maps("layers", matrices, maps) if maps else "neither energy ratios nor cosines"


def layer_maps(name: str, matrices: Mapping[str, Group], maps: Mapping[str, Mapping[str, float | None]]) -> Chart | str:
    """Return maps of layers by kinds of matrices, by title with a value for each matrix; or why there are none."""
    found = {}
    for title, values in maps.items():
        places: dict[tuple[int, str], list[float]] = defaultdict(list)
        for matrix, group in matrices.items():
            if group.layer is not None and (value := values.get(matrix)) is not None:
                places[group.layer, group.kind or ""].append(value)
        if places:
            found[title] = {place: statistics.fmean(some) for place, some in places.items()}
    return Maps(name, found) if found else "names tell no layers, as model.layers.12.self_attn.q_proj.weight does"


def _lines(overall: Group, name: str, words: str, colour: str) -> list[Line]:
    """Return the median over matrices with their quartiles as a band, and the null dashed with its interval."""
    series = overall.series[name]
    found = [Line(words, series.x, series.value, series.low, series.high, colour, dots=True)]
    if series.null is not None:
        parts = ("mean", "low", "high")
        mean, low, high = ([None if one is None else getattr(one, part) for one in series.null] for part in parts)
        found.append(Line("random walk", series.x, mean, low, high, "walk" if name == "msd" else colour, dashed=True))
    return found


def _known(series: Series | None) -> bool:
    return series is not None and any(value is not None for value in series.value)

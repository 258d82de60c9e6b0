"""``analyze``: the geometry of a run's weights over time, each figure with its random-walk null."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from next_core.diagnostics.analysis_results import Analysis, Precision, advice
from next_core.diagnostics.figures import FIGURES, Figure, Group, Null, Series
from next_core.diagnostics.gram_figures import OUT_OF_SAMPLE, Curve, gram_figures, step_lengths
from next_core.diagnostics.learning_rate import Agreements, judge, measure_agreements
from next_core.diagnostics.random_walks import FEWEST_DRAWS, band, chunks, dimensions, isotropic_walks, median, quantile
from next_core.diagnostics.trajectory import FEWEST_POINTS, Grid, measured_steps, read_grams
from next_core.diagnostics.triplet_figures import triplet_figures, triplet_nulls
from next_core.errors import invalid_value
from next_core.history.history import History
from next_core.sources.matrices import stored_name
from next_core.sources.precision import LOW, rounding_report

LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
SHARES = frozenset(name for name in FIGURES if name.startswith(("energy", "squared", "cosine_u", "cosine_v")))
"""Figures between 0 and 1: the interval of their few draws is cut there."""
NEWEST = ("energy_ratio_global", "squared_energy_ratio_global")
"""Read at the newest checkpoint; other figures over time are summed up by their median over time."""
MANY = 32
"""Beyond so many intervals, the figures of the SVD over time are taken of fewer walks: cost grows with the cube."""
NO_NULL = ("speed_ratio", "speed")  # Walks have the observed speed: there is nothing to compare
FEWEST_INTERVALS = {
    "c1_r2": 3, "line_r2": 3, "speed_ratio": 3, "top_5_share": 6, "top_1_of_top_5": 6, "msd_exponent": 4
}  # fmt: skip


class Measured(NamedTuple):
    """One figure of M matrices, (M,), and of their walks, (D, M)."""

    values: Tensor
    draws: Tensor | None = None


Figures = dict[str, Measured]
Curves = dict[str, Curve]  # Curves of M matrices, (M, L)


def analyze(history: History, *, horizon: int | None = None, draws: int = 200, seed: int = 0) -> Analysis:
    """Measure the figures of ``FIGURES`` per matrix, layer and kind, and overall, with ``draws`` walks for the nulls.

    ``horizon`` (RL steps) is that of the out-of-sample figures; None takes the longest up to a third of the run. What
    the checkpoints do not allow is None, with its reason in ``missing``. Raises ``ConfigError`` for a horizon below 1
    or too few draws, ``CheckpointError`` for what cannot be read (see ``with_origin`` for a backbone that is missing).
    """
    if horizon is not None and horizon < 1:
        raise invalid_value(f"horizon must be at least 1 RL step (got {horizon})")
    if draws < FEWEST_DRAWS:
        raise invalid_value(f"draws must be at least {FEWEST_DRAWS}, for a 95% interval (got {draws})")
    names, steps = history.names, measured_steps(history)
    grid = Grid((history.source.origin, *steps), horizon)
    horizon = grid.default_horizon() if horizon is None else horizon
    agreements = measure_agreements(history, draws, seed)
    figures: Figures = {}
    curves: Curves = {}
    if names:
        figures, curves = _inner_product_figures(history, grid, horizon, draws, seed)
        _add_triplet_figures(figures, curves, history, seed)
    if isinstance(agreements, Agreements):
        values, drawn = agreements.values, agreements.draws
        figures["agreement"] = Measured(median(values), median(drawn))
        curves["agreement"] = Curve("step", agreements.moments, values, median(drawn, 1))
    layers, kinds = defaultdict[int, list[int]](list), defaultdict[str, list[int]](list)
    for index, name in enumerate(names):
        kinds[kind_of(name)].append(index)
        if (layer := layer_of(name)) is not None:
            layers[layer].append(index)
    found = Analysis(
        steps=steps,
        origin=history.source.origin,
        even=grid.even,
        horizon=horizon,
        draws=draws,
        seed=seed,
        overall=_group(figures, curves, names, list(range(len(names))), with_null=True),
        layers={layer: _group(figures, curves, names, members) for layer, members in sorted(layers.items())},
        kinds={kind: _group(figures, curves, names, members) for kind, members in sorted(kinds.items())},
        matrices={
            name: Group((name,), own, layer=layer_of(name), kind=kind_of(name))
            for name, own in zip(names, _each(figures, len(names)), strict=True)
        },
        frozen=history.frozen,
        skipped=dict(history.source.skipped),
        missing={
            name: _why_missing(name, bool(names), grid, horizon, agreements)
            for name in FIGURES
            if name not in figures or bool(figures[name].values.isnan().all())
        },
        learning_rate=judge(history, agreements, history.jump_log),
        notes=tuple(history.source.notes),
        precision=_read_precision(history),
    )
    return dataclasses.replace(found, advice=advice(found))


def layer_of(name: str) -> int | None:
    """Return 12 for ``model.layers.12.self_attn.q_proj.weight``; None for a matrix outside the layers."""
    match = LAYER.search(f".{name}")
    return None if match is None else int(match.group(1))


def kind_of(name: str) -> str:
    """Return ``q_proj`` for ``model.layers.12.self_attn.q_proj.weight``; experts of one stack are of one kind."""
    return stored_name(name).removesuffix(".weight").split(".")[-1]


def _inner_product_figures(
    history: History, grid: Grid, horizon: int | None, draws: int, seed: int
) -> tuple[Figures, Curves]:
    """Return what follows from inner products; walks take the observed step lengths in random directions."""
    grams = read_grams(history)
    lengths, space, rng = step_lengths(grams), dimensions(history, grid.times[1:]), np.random.default_rng(seed)
    figures, curves = gram_figures(grams, grid, horizon)
    decomposed = draws if grid.intervals <= MANY else max(FEWEST_DRAWS, int(draws * (MANY / grid.intervals) ** 3))
    drawn, drawn_curves = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list)
    for start, count in chunks(draws, lengths):
        walks = isotropic_walks(lengths, space, count, rng)
        some, some_curves = gram_figures(walks, grid, horizon, start < decomposed)
        for name, value in some.items():
            drawn[name].append(value)
        for name, curve in some_curves.items():
            drawn_curves[name].append(median(curve.values, 1))
    nulls = {name: torch.cat(drawn[name]) for name in figures if name not in NO_NULL}
    curve_nulls = {name: torch.cat(drawn_curves[name]) for name in curves if name not in NO_NULL}
    return (
        {name: Measured(value, nulls.get(name)) for name, value in figures.items()},
        {name: curve._replace(draws=curve_nulls.get(name)) for name, curve in curves.items()},
    )


def _add_triplet_figures(figures: Figures, curves: Curves, history: History, seed: int) -> None:
    """Add what needs singular triplets."""

    def over_time(name: str, value: Tensor) -> Tensor:
        return value[..., -1] if name in NEWEST else median(value)

    steps, nulls = measured_steps(history), triplet_nulls(history, seed)
    for name, value in triplet_figures(history).items():
        drawn = nulls.get(name)
        first = 1 if name.startswith("cosine") else 0
        if len(steps) > first:
            null = None if drawn is None else median(drawn[:, :, first:], 1)
            curves[name] = Curve("step", steps[first:], value[:, first:], null)
            figures[name] = Measured(over_time(name, value), None if drawn is None else over_time(name, drawn))


def _each(figures: Figures, count: int) -> list[dict[str, Figure]]:
    found: list[dict[str, Figure]] = [{} for _ in range(count)]
    for name in filter(figures.__contains__, FIGURES):
        values, draws = figures[name]
        nulls = [None] * count if draws is None else _nulls(name, draws)
        for own, value, null in zip(found, _numbers(values), nulls, strict=True):
            own[name] = Figure(value, None, int(value is not None), null)
    return found


def _group(
    figures: Figures, curves: Curves, names: Sequence[str], members: list[int], with_null: bool = False
) -> Group:
    """Return medians over some matrices; the null is that of the median."""
    found: dict[str, Figure] = {}
    series: dict[str, Series] = {}
    for name in filter(figures.__contains__, FIGURES if members else ()):
        values, draws = figures[name]
        low, middle, high = _numbers(torch.stack([quantile(values[members], q) for q in (0.25, 0.5, 0.75)]))
        quartiles = None if low is None or high is None else (low, high)
        null = None if draws is None else _nulls(name, median(draws[:, members])[:, None])[0]
        found[name] = Figure(middle, quartiles, int((~values[members].isnan()).sum()), null)
    for name, (over, x, each, drawn) in curves.items() if members else ():
        below, between, above = (tuple(_numbers(quantile(each[members], q, 0))) for q in (0.25, 0.5, 0.75))
        nulls = None if drawn is None or not with_null else tuple(_nulls(name, drawn))
        series[name] = Series(over, x, between, below, above, nulls)
    return Group(tuple(names[index] for index in members), found, series)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _nulls(name: str, draws: Tensor) -> list[Null | None]:
    """Return the null of each of L columns of draws (D, L)."""
    low, high = (0.0, 1.0) if name in SHARES else (-math.inf, math.inf)
    each = torch.stack(band(draws), -1).clamp(low, high).tolist()
    return [Null(*one) if all(map(math.isfinite, one)) else None for one in each]


def _why_missing(name: str, moved: bool, grid: Grid, horizon: int | None, agreements: Agreements | str) -> str:
    if not moved:
        return "no matrix moved over the last interval: did training change the weights?"
    if name == "agreement" and isinstance(agreements, str):
        return agreements
    if name in OUT_OF_SAMPLE:
        if not grid.horizons:
            return f"needs {FEWEST_POINTS} checkpoints, so that a line through {FEWEST_POINTS} points meets a later one"
        if horizon not in grid.horizons:
            there = ", ".join(map(str, grid.horizons))
            return f"no checkpoints are {horizon} steps apart to check a line with; choose a horizon of {there}"
        return "needs two checkpoints to predict at this horizon, there is one; take a shorter horizon"
    if name.startswith("energy_ratio"):
        return "needs all singular values: --spectrum, or History(source, rank, spectrum=True)"
    if grid.intervals < (needs := FEWEST_INTERVALS.get(name, 2)):
        return f"needs {needs} checkpoints after step {grid.times[0]} (there: {grid.intervals})"
    return "not defined for any matrix: they stood still in between"


def _read_precision(history: History) -> Precision | None:
    """Compare the newest interval with the rounding step; None unless full checkpoints are stored in low precision."""
    source, steps = history.source, measured_steps(history)
    coarse = [name for name in history.names if source.precision(name) in LOW]
    if len(steps) < 2 or not coarse or not source.stores_full_weights:
        return None
    components = history.components("local", align=False)  # their singular values are known: nothing is decomposed anew
    step, since = steps[-1], steps[-2]
    reports = [rounding_report(source, name, step, since, sigma=float(components[name].S[-1, 0])) for name in coarse]
    return Precision(
        step=step,
        since=since,
        delta_to_ulp={report.name: report.delta_to_ulp for report in reports if math.isfinite(report.delta_to_ulp)},
        drowned=tuple(report.name for report in reports if report.drowned),
    )

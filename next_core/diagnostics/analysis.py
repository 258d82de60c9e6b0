"""``analyze``: what is going on in a run's weights, each figure beside its random-walk null."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from next_core.diagnostics.advice import advice
from next_core.diagnostics.analysis_results import FIGURES, Analysis, Figure, Group, Null, Series
from next_core.diagnostics.figures import (
    FEWEST_DRAWS,
    OUT_OF_SAMPLE,
    Agreements,
    Raw,
    measure,
    measure_agreements,
    median,
    quantile,
)
from next_core.diagnostics.learning_rate import judge
from next_core.diagnostics.nulls import Band, band
from next_core.diagnostics.stored_precision import read_precision
from next_core.diagnostics.trajectory import FEWEST_POINTS, Trajectory, measured_steps, read_trajectory
from next_core.errors import ConfigError
from next_core.history.history import History

LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
SHARES = frozenset(name for name in FIGURES if name.startswith(("energy", "squared", "cosine_u", "cosine_v")))
"""Figures between 0 and 1: the interval of their few draws is cut there."""


def analyze(history: History, *, horizon: int | None = None, draws: int = 200, seed: int = 0) -> Analysis:
    """The figures of ``FIGURES`` per matrix, layer and kind, and overall, with ``draws`` random walks for the nulls.

    ``horizon`` (RL steps) is that of the out-of-sample figures; None takes the longest up to a third of the run. What
    the checkpoints do not allow is None, with its reason in ``missing``. Raises ``ConfigError`` for a horizon below 1
    or too few draws, ``CheckpointError`` for what cannot be read (see ``with_origin`` for a backbone that is missing).
    """
    if horizon is not None and horizon < 1:
        raise ConfigError(f"horizon must be at least 1 RL step (got {horizon})")
    if draws < FEWEST_DRAWS:
        raise ConfigError(f"draws must be at least {FEWEST_DRAWS}, for a 95% interval (got {draws})")
    trajectory = read_trajectory(history)
    chosen = trajectory.grid.default_horizon() if horizon is None else horizon
    agreements = measure_agreements(history, draws, seed)
    raw = measure(history, trajectory, agreements, chosen, draws, seed)
    names = trajectory.names
    places = {name: index for index, name in enumerate(names)}
    layers: dict[int, list[int]] = {}
    kinds: dict[str, list[int]] = {}
    for name, index in places.items():
        kinds.setdefault(kind_of(name), []).append(index)
        layer = layer_of(name)
        if layer is not None:
            layers.setdefault(layer, []).append(index)
    alone = _each(raw, len(names) + 1)
    found = Analysis(
        steps=measured_steps(history),
        origin=history.source.origin,
        even=trajectory.grid.even,
        horizon=chosen,
        draws=draws,
        seed=seed,
        overall=_group(raw, names, list(places.values()), with_null=True),
        whole=Group(names, {k: figure for k, figure in alone[-1].items() if figure.value is not None}),
        layers={layer: _group(raw, names, layers[layer]) for layer in sorted(layers)},
        kinds={kind: _group(raw, names, kinds[kind]) for kind in sorted(kinds)},
        matrices={
            name: Group((name,), alone[index], layer=layer_of(name), kind=kind_of(name))
            for name, index in places.items()
        },
        frozen=history.frozen,
        skipped=dict(history.source.skipped),
        missing=_missing(trajectory, raw, agreements, chosen),
        learning_rate=judge(agreements, history.jump_log),
        notes=tuple(history.source.notes),
        precision=read_precision(history),
    )
    return dataclasses.replace(found, advice=advice(found))


def layer_of(name: str) -> int | None:
    """12 for ``model.layers.12.self_attn.q_proj.weight``; None for what belongs to no layer."""
    match = LAYER.search(f".{name}")
    return None if match is None else int(match.group(1))


def kind_of(name: str) -> str:
    """``q_proj`` for ``model.layers.12.self_attn.q_proj.weight``."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]


def _each(raw: Raw, count: int) -> list[dict[str, Figure]]:
    """The figures of each matrix alone, the whole run last."""
    found: list[dict[str, Figure]] = [{} for _ in range(count)]
    for name in FIGURES:
        if name not in raw.scalars:
            continue
        nulls = _nulls(name, band(raw.scalar_draws[name])) if name in raw.scalar_draws else [None] * count
        for index, value in enumerate(_numbers(raw.scalars[name])):
            found[index][name] = Figure(value, None, int(value is not None), nulls[index])
    return found


def _group(raw: Raw, names: Sequence[str], members: list[int], with_null: bool = False) -> Group:
    """Medians over some matrices; the null is that of the median."""
    figures: dict[str, Figure] = {}
    for name in FIGURES:
        if name not in raw.scalars or not members:
            continue
        values = raw.scalars[name][members]
        [low], [middle], [high] = (_numbers(quantile(values, q)[None]) for q in (0.25, 0.5, 0.75))
        quartiles = None if low is None or high is None else (low, high)
        null = None
        if name in raw.scalar_draws:
            [null] = _nulls(name, band(median(raw.scalar_draws[name][:, members])[:, None]))
        figures[name] = Figure(middle, quartiles, int((~values.isnan()).sum()), null)
    series: dict[str, Series] = {}
    for name, (over, x, each) in raw.series.items() if members else ():
        low_, middle_, high_ = (_numbers(quantile(each[members], q, 0)) for q in (0.25, 0.5, 0.75))
        drawn = raw.series_draws.get(name) if with_null else None
        null_ = None if drawn is None else tuple(_nulls(name, band(drawn)))
        series[name] = Series(over, x, tuple(middle_), tuple(low_), tuple(high_), null_)
    return Group(tuple(names[index] for index in members), figures, series)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _nulls(name: str, bands: Band) -> list[Null | None]:
    low, high = (0.0, 1.0) if name in SHARES else (-math.inf, math.inf)
    each = torch.stack(list(bands), -1).clamp(low, high).tolist()
    return [Null(*one) if all(map(math.isfinite, one)) else None for one in each]


def _missing(trajectory: Trajectory, raw: Raw, agreements: Agreements | str, horizon: int | None) -> Mapping[str, str]:
    """Why a figure is not there for any matrix."""
    grid = trajectory.grid
    found: dict[str, str] = {}
    for name in FIGURES:
        if name in raw.scalars and not bool(raw.scalars[name].isnan().all()):
            continue
        if not trajectory.names:
            found[name] = "no matrix moved over the last interval: did training change the weights?"
        elif name == "agreement" and isinstance(agreements, str):
            found[name] = agreements
        elif name in OUT_OF_SAMPLE:
            found[name] = _no_target(trajectory, horizon)
        elif name.startswith("energy_ratio"):
            found[name] = "needs all singular values: --spectrum, or History(source, rank, spectrum=True)"
        else:
            needs = _FEWEST.get(name, 2)
            have = f"{grid.intervals} checkpoint{'s' if grid.intervals != 1 else ''} after step {grid.times[0]}"
            few = f"needs {needs} checkpoints, there {'is' if grid.intervals == 1 else 'are'} {have}"
            found[name] = few if grid.intervals < needs else "not defined for any matrix: they stood still in between"
    return found


_FEWEST = {"c1_r2": 3, "line_r2": 3, "speed_ratio": 3, "top_5_share": 6, "top_1_of_top_5": 6, "msd_exponent": 4}


def _no_target(trajectory: Trajectory, horizon: int | None) -> str:
    grid = trajectory.grid
    if not grid.horizons:
        return f"needs {FEWEST_POINTS} checkpoints, so that a line through {FEWEST_POINTS} points meets a later one"
    if horizon not in grid.horizons:
        there = ", ".join(map(str, grid.horizons))
        return f"no checkpoints {horizon} steps apart to check a line with; horizons that are: {there}"
    return "needs two checkpoints to predict at this horizon, there is one; take a shorter horizon"

"""All figures of all matrices at once, observed and under the null: the same functions for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from next_core.diagnostics import linearity, motion
from next_core.diagnostics.energy import energy_over_time
from next_core.diagnostics.energy_nulls import energy_nulls
from next_core.diagnostics.nulls import dimensions, isotropic_walks
from next_core.diagnostics.trajectory import Grid, Trajectory, measured_steps, read_motions
from next_core.history.history import History

CHUNK_BYTES = 32 * 2**20
"""Gram matrices that are drawn at a time take at most this much."""
FEWEST_DRAWS = 20
"""Fewer walks than this give no interval."""
MANY = 32
"""From this many intervals on, time components are taken of fewer walks: their cost grows with the cube."""
NEWEST = ("energy_ratio_global", "squared_energy_ratio_global")
"""Read at the newest checkpoint; the other figures over time as their median over time."""
OUT_OF_SAMPLE = ("line_skill", "pinned_skill", "line_r2_out")

Over = Literal["step", "horizon", "lag"]


@dataclass(frozen=True)
class Raw:
    """Figures before they are summed up. The last of the M + 1 columns is the whole run as one vector.

    ``scalars`` (M + 1,), ``scalar_draws`` (D, M + 1); ``series`` (M, L) with what it runs over and where; the draws
    of a series are already those of its median over the matrices, (D, L).
    """

    scalars: dict[str, Tensor] = field(default_factory=dict)
    scalar_draws: dict[str, Tensor] = field(default_factory=dict)
    series: dict[str, tuple[Over, tuple[int, ...], Tensor]] = field(default_factory=dict)
    series_draws: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreements:
    """lambda of successive motions of ``span`` RL steps at some moments, (M + 1, L), and of walks, (D, M + 1, L)."""

    span: int
    moments: tuple[int, ...]
    values: Tensor
    draws: Tensor


def measure_agreements(history: History, draws: int, seed: int) -> Agreements | str:
    """The agreement of successive motions and its null, or why it cannot be told. See ``Raw`` for the shapes."""
    motions = read_motions(history)
    if isinstance(motions, str):
        return motions
    lengths, rng = motions.lengths, np.random.default_rng(seed)
    chunk = max(1, CHUNK_BYTES // (8 * lengths.numel() * lengths.shape[1]))
    drawn = [
        motions.agreements(_and_whole(isotropic_walks(lengths, motions.dimensions, min(chunk, draws - start), rng)))
        for start in range(0, draws, chunk)
    ]
    values = motions.agreements(_and_whole(motions.grams))
    return Agreements(motions.span, motions.moments, values, torch.cat(drawn))


def measure(
    history: History,
    trajectory: Trajectory,
    agreements: Agreements | str,
    horizon: int | None,
    draws: int,
    seed: int,
) -> Raw:
    """Everything: from Gram matrices where that is enough, from singular triplets for the rest."""
    raw = Raw()
    if trajectory.names:
        _gram_part(raw, history, trajectory, horizon, draws, seed)
        _energy_part(raw, history, seed)
    if isinstance(agreements, Agreements):
        raw.scalars["agreement"], raw.scalar_draws["agreement"] = median(agreements.values), median(agreements.draws)
        raw.series["agreement"] = ("step", agreements.moments, agreements.values[:-1])
        raw.series_draws["agreement"] = median(agreements.draws[:, :-1], 1)
    return raw


def gram_figures(
    grams: Tensor, grid: Grid, horizon: int | None, components: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Figures (...,) and series (..., L) of steps whose Gram matrices are (..., N, N); what N allows.

    ``components`` asks for the time components too, whose eigenvalues cost far more than the rest when N is large.
    """
    scalars: dict[str, Tensor] = {}
    series: dict[str, Tensor] = {"speed": motion.speed(grams, grid)}
    if grid.intervals >= 2:
        scalars |= linearity.line_in_sample(grams, grid)
        if components:
            scalars |= linearity.time_components(grams, grid)
        scalars["straightness"] = motion.straightness(grams)
        series["cosine_local"] = motion.successive_cosines(grams)
        scalars["cosine_local"] = median(series["cosine_local"])
    if grid.intervals >= 3:
        scalars["speed_ratio"] = motion.speed_ratio(series["speed"])
    forward = linearity.walk_forward(grams, grid)
    series |= forward
    if horizon in grid.horizons:
        at = grid.horizons.index(horizon)
        scalars |= {name: value[..., at] for name, value in forward.items()}
    if len(grid.lags) >= 2:
        displacement = motion.mean_squared_displacement(grams, grid)
        scalars["msd_exponent"] = motion.displacement_exponent(displacement, grid)
        series["msd"] = linearity.share(displacement, displacement[..., :1])
    return scalars, series


def _gram_part(raw: Raw, history: History, trajectory: Trajectory, horizon: int | None, draws: int, seed: int) -> None:
    grid = trajectory.grid
    scalars, series = gram_figures(_and_whole(trajectory.grams), grid, horizon)
    raw.scalars.update(scalars)
    places: dict[str, tuple[Over, tuple[int, ...]]] = {
        "speed": ("step", grid.times[1:]),
        "cosine_local": ("step", grid.times[2:]),
        "msd": ("lag", grid.lags),
    }
    for name in OUT_OF_SAMPLE:
        places[name] = "horizon", grid.horizons
    raw.series.update({name: (*places[name], value[:-1]) for name, value in series.items()})
    if not scalars:
        return
    lengths, space = trajectory.lengths, dimensions(history, measured_steps(history))
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_BYTES // (8 * max(1, lengths.numel()) * grid.intervals))
    decomposed = draws if grid.intervals <= MANY else max(FEWEST_DRAWS, int(draws * (MANY / grid.intervals) ** 3))
    drawn: dict[str, list[Tensor]] = {}
    drawn_series: dict[str, list[Tensor]] = {}
    for start in range(0, draws, chunk):
        walks = isotropic_walks(lengths, space, min(chunk, draws - start), rng)
        scalars, series = gram_figures(_and_whole(walks), grid, horizon, start < decomposed)
        for name, value in scalars.items():
            drawn.setdefault(name, []).append(value)
        for name, value in series.items():
            drawn_series.setdefault(name, []).append(median(value[:, :-1], 1))
    raw.scalar_draws.update({name: torch.cat(parts) for name, parts in drawn.items()})
    raw.series_draws.update({name: torch.cat(parts) for name, parts in drawn_series.items()})
    # The walks have the observed step lengths: there is nothing to compare.
    raw.scalar_draws.pop("speed_ratio", None)
    raw.series_draws.pop("speed", None)


def _energy_part(raw: Raw, history: History, seed: int) -> None:
    steps = measured_steps(history)
    nulls = energy_nulls(history, seed)
    for name, value in energy_over_time(history).items():
        drawn = nulls.get(name)
        first = 1 if name.startswith("cosine") else 0
        if len(steps) <= first:
            continue
        raw.series[name] = ("step", steps[first:], value[:, first:])
        raw.scalars[name] = _pad(_over_time(name, value))
        if drawn is not None:
            raw.series_draws[name] = median(drawn[:, :, first:], 1)
            raw.scalar_draws[name] = _pad(_over_time(name, drawn))


def _over_time(name: str, value: Tensor) -> Tensor:
    return value[..., -1] if name in NEWEST else median(value)


def _pad(value: Tensor) -> Tensor:
    """The whole run as one vector is no matrix."""
    return torch.nn.functional.pad(value, (0, 1), value=torch.nan)


def _and_whole(grams: Tensor) -> Tensor:
    """(..., M, N, N) and the Gram matrix of all matrices together: (..., M + 1, N, N)."""
    return torch.cat([grams, grams.sum(-3, keepdim=True)], -3)


def median(values: Tensor, dim: int = -1) -> Tensor:
    """The median of what is not NaN, the mean of the middle two for an even count; NaN where nothing is left."""
    return quantile(values, 0.5, dim)


def quantile(values: Tensor, q: float, dim: int = -1) -> Tensor:
    """Quantile q of what is not NaN, linear between neighbours; NaN where nothing is left."""
    ordered = values.movedim(dim, -1).sort(-1).values  # NaN last
    there = (~ordered.isnan()).sum(-1, keepdim=True)
    place = q * (there - 1).clamp_min(0).double()
    below, above = place.floor().long(), place.ceil().long()
    low, high = ordered.gather(-1, below), ordered.gather(-1, above)
    return torch.lerp(low, high, place - place.floor())[..., 0]

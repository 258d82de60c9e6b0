"""A run as points in time: inner products of each matrix's steps, from which all linear figures follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.history.history import History
from next_core.history.motion_grams import motion_grams
from next_core.mathematics.agreement import agreement, comparable_span
from next_core.types import Span

MOST_HORIZONS = 32
"""At most so many lags and horizons are measured, evenly chosen: unevenly spaced runs have many distinct ones."""
MOST_MOMENTS = 32
"""At most so many moments at which successive motions are compared."""
FEWEST_POINTS = 3
"""A line must be fitted to at least so many points, the start among them, before it has to predict."""


@dataclass(frozen=True)
class Grid:
    """The moments of a run: N + 1 points in RL steps, the first of which is where RL began, and N intervals."""

    times: tuple[int, ...]

    @property
    def intervals(self) -> int:
        return len(self.times) - 1

    @property
    def span(self) -> int:
        """RL steps from the first point to the last."""
        return self.times[-1] - self.times[0]

    @cached_property
    def t(self) -> Tensor:
        """The times, fp64, (N + 1)."""
        return torch.tensor(self.times, dtype=torch.float64)

    @property
    def even(self) -> bool:
        """Whether all intervals have one length."""
        return len({b - a for a, b in itertools.pairwise(self.times)}) <= 1

    @cached_property
    def lags(self) -> tuple[int, ...]:
        """The distinct distances between two points, in RL steps, up to half the span: longer ones have few pairs."""
        return _some(sorted({b - a for a, b in itertools.combinations(self.times, 2) if 2 * (b - a) <= self.span}))

    @cached_property
    def horizons(self) -> tuple[int, ...]:
        """The lags at which a line fitted to ``FEWEST_POINTS`` or more points meets a later point."""
        return tuple(lag for lag in self.lags if self.targets(lag))

    def pairs(self, lag: int) -> list[tuple[int, int]]:
        """Return index pairs (i, j) of points that are ``lag`` RL steps apart."""
        where = {time: index for index, time in enumerate(self.times)}
        return [(i, where[time + lag]) for i, time in enumerate(self.times) if time + lag in where]

    def targets(self, horizon: int) -> list[tuple[int, int]]:
        """Return the pairs (i, j) of ``pairs(horizon)`` with at least ``FEWEST_POINTS`` points up to i."""
        return [(i, j) for i, j in self.pairs(horizon) if i + 1 >= FEWEST_POINTS]

    def default_horizon(self) -> int | None:
        """Return the longest horizon up to a third of the span (as 50 after 150 observed steps), else the shortest."""
        short = [horizon for horizon in self.horizons if 3 * horizon <= self.span]
        return short[-1] if short else (self.horizons[0] if self.horizons else None)

    def form(self, rows: Tensor) -> Tensor:
        """Return the quadratic form in the N steps, (N, N), that gives sum over rows c of |sum_j c_j W_j|^2.

        ``rows`` (K, N + 1) are coefficients over the points; each row sums to zero, so only differences of points
        count. With K the Gram matrix of the steps the sum is <form, K>: point j is the start and the first j steps.
        """
        of_steps = rows.flip(-1).cumsum(-1).flip(-1)[:, 1:]
        return of_steps.T @ of_steps


@dataclass(frozen=True)
class Trajectory:
    """The steps of all moving matrices: Gram matrices <x_i, x_j>, fp64, (M, N, N), of x_i = W_i - W_{i-1}."""

    names: tuple[str, ...]
    grid: Grid
    grams: Tensor


def read_trajectory(history: History) -> Trajectory:
    """Read the steps between neighbouring checkpoints directly, so that nothing cancels.

    Raises what the source raises: ``CheckpointError`` for values that are not finite or a missing backbone.
    """
    steps = measured_steps(history)
    grid = Grid((history.source.origin, *steps))
    spans: list[Span] = [(step, before) for before, step in itertools.pairwise((None, *steps)) if step is not None]
    found = history.inner_products(spans) if history.names and steps else {}
    empty = torch.zeros(0, len(steps), len(steps), dtype=torch.float64)
    grams = torch.stack([found[name] for name in history.names]) if found else empty
    return Trajectory(history.names if found else (), grid, grams)


def measured_steps(history: History) -> tuple[int, ...]:
    """Return the observed steps but step 0, which is where RL began and so the start itself."""
    return tuple(step for step in history.steps if step > history.source.origin)


@dataclass(frozen=True)
class Motions:
    """Inner products of the motions between neighbouring ``points``, for the agreement of successive motions.

    At each of ``moments`` two successive motions of ``span`` RL steps end. ``grams`` (M, N, N), fp64, are those of
    the adapter's own factors, which have ``dimensions`` (M,) many entries, or of the matrices without LoRA.
    """

    span: int
    moments: tuple[int, ...]
    points: tuple[int, ...]
    grams: Tensor
    dimensions: Tensor

    def agreements(self, grams: Tensor) -> Tensor:
        """Return lambda at each moment, of motions whose Gram matrices are (..., N, N): (..., moments)."""
        at = {point: index for index, point in enumerate(self.points)}
        each = []
        for moment in self.moments:
            first, middle, last = (at[moment - back * self.span] for back in (2, 1, 0))
            each.append(agreement(grams, slice(first, middle), slice(middle, last)))
        return torch.stack(each, -1)


def read_motions(history: History) -> Motions | str:
    """Return the motions whose agreement can be measured, or why there are none.

    Moments are half a span apart or more.
    """
    if not history.names:
        return "no matrix moved over the last interval: did training change the weights?"
    steps = measured_steps(history)
    known = {*steps, history.source.origin} if _start_is_known(history) else {*steps}
    span = comparable_span(known, steps)
    if span is None:
        return f"no two successive motions of one length between {len(known)} points: {_listed(sorted(known))}"
    moments: list[int] = []
    for step in reversed(steps):
        if known >= {step - span, step - 2 * span} and (not moments or 2 * (moments[-1] - step) >= span):
            moments.append(step)
    chosen = _some(moments[::-1], MOST_MOMENTS)
    points = tuple(sorted({moment - back * span for moment in chosen for back in (0, 1, 2)}))
    grams = motion_grams(history, points)
    entries = [_entries(history.shapes[name], history.ranks[name]) for name in history.names]
    return Motions(
        span, chosen, points, torch.stack([grams[name] for name in history.names]), torch.tensor(entries).double()
    )


def _start_is_known(history: History) -> bool:
    """Whether steps can be compared with where RL began: for LoRA, only where the adapter's own step 0 was kept."""
    try:
        for name in history.names:
            if history.ranks[name] is not None:
                return history.source.factors(name, history.source.origin) is not None
    except CheckpointError:
        return False
    return True


def _entries(shape: tuple[int, int], rank: int | None) -> int:
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")


def _some(values: list[int], most: int = MOST_HORIZONS) -> tuple[int, ...]:
    if len(values) <= most:
        return tuple(values)
    chosen = torch.linspace(0, len(values) - 1, most).round().int().tolist()
    return tuple(values[index] for index in chosen)

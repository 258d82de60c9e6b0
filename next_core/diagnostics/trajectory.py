"""A run as points in time: where each matrix was, as inner products of its steps. All linear figures need no more."""

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
"""Lags and horizons looked at; of more distinct ones (uneven spacing, many checkpoints) an even choice is taken."""
MOST_MOMENTS = 32
"""Moments at which successive motions are compared; of more, an even choice is taken."""
FEWEST_POINTS = 3
"""A line is fitted to at least this many points, the start among them, before it has to predict."""


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
        """Whether all intervals are of one length."""
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
        """Index pairs (i, j) of points that lie ``lag`` RL steps apart."""
        where = {time: index for index, time in enumerate(self.times)}
        return [(i, where[time + lag]) for i, time in enumerate(self.times) if time + lag in where]

    def targets(self, horizon: int) -> list[tuple[int, int]]:
        """The pairs (i, j) of ``pairs(horizon)`` with at least ``FEWEST_POINTS`` points up to i."""
        return [(i, j) for i, j in self.pairs(horizon) if i + 1 >= FEWEST_POINTS]

    def default_horizon(self) -> int | None:
        """The longest horizon up to a third of the span (as 50 after 150 observed steps), else the shortest."""
        short = [horizon for horizon in self.horizons if 3 * horizon <= self.span]
        return short[-1] if short else (self.horizons[0] if self.horizons else None)

    def form(self, rows: Tensor) -> Tensor:
        """sum over rows c of |sum_j c_j W_j|^2 as a quadratic form in the N steps: (N, N).

        ``rows`` (K, N + 1) are coefficients over the points, each row summing to zero, so that only differences of
        points count. The sum is <form, K> with K the Gram matrix of the steps.
        """
        of_steps = rows.flip(-1).cumsum(-1).flip(-1)[:, 1:]  # point j is the start and the first j steps
        return of_steps.T @ of_steps


@dataclass(frozen=True)
class Trajectory:
    """The steps of all moving matrices: Gram matrices <x_i, x_j>, fp64, (M, N, N), of x_i = W_i - W_{i-1}."""

    names: tuple[str, ...]
    grid: Grid
    grams: Tensor

    @property
    def lengths(self) -> Tensor:
        """The norm of each step, (M, N)."""
        return self.grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Motions:
    """What the agreement of successive motions needs: inner products of the motions between neighbouring ``points``.

    At each of ``moments`` two successive motions of ``span`` RL steps end. ``grams`` (M, N, N), fp64, are those of
    the adapter's own factors, of which there are ``dimensions`` (M,) many entries, and of the matrices without LoRA.
    """

    span: int
    moments: tuple[int, ...]
    points: tuple[int, ...]
    grams: Tensor
    dimensions: Tensor

    @property
    def lengths(self) -> Tensor:
        """The norm of each motion, (M, N)."""
        return self.grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()

    def agreements(self, grams: Tensor) -> Tensor:
        """lambda at each moment, of motions whose Gram matrices are (..., N, N): (..., moments)."""
        at = {point: index for index, point in enumerate(self.points)}
        each = []
        for moment in self.moments:
            first, middle, last = (at[moment - back * self.span] for back in (2, 1, 0))
            each.append(agreement(grams, slice(first, middle), slice(middle, last)))
        return torch.stack(each, -1)


def read_motions(history: History) -> Motions | str:
    """The motions whose agreement can be told, or why there are none. Moments lie half a span apart or more."""
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
    return Motions(
        span,
        chosen,
        points,
        torch.stack([grams[name] for name in history.names]),
        torch.tensor([_entries(history, name) for name in history.names], dtype=torch.float64),
    )


def _start_is_known(history: History) -> bool:
    """Whether where RL began can be compared with: of LoRA, only where the adapter's own step 0 was kept."""
    try:
        for name in history.names:
            if history.ranks[name] is not None:
                return history.source.factors(name, history.source.origin) is not None
    except CheckpointError:
        return False
    return True


def _entries(history: History, name: str) -> int:
    (m, n), rank = history.shapes[name], history.ranks[name]
    return m * n if rank is None else rank * (m + n)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")


def apply_forms(grams: Tensor, forms: Sequence[Tensor]) -> Tensor:
    """<form_f, K> for each Gram matrix (..., N, N) and each of F forms (N, N): (..., F)."""
    return grams.flatten(-2) @ torch.stack(list(forms)).flatten(1).T


def measured_steps(history: History) -> tuple[int, ...]:
    """The observed steps but step 0, which is where RL began and so the start itself."""
    return tuple(step for step in history.steps if step > history.source.origin)


def read_trajectory(history: History) -> Trajectory:
    """The steps between neighbouring checkpoints, taken directly: nothing cancels.

    Raises what the source raises: ``CheckpointError`` for values that are not finite or a backbone that is not there.
    """
    steps = measured_steps(history)
    grid = Grid((history.source.origin, *steps))
    spans: list[Span] = [(step, before) for before, step in itertools.pairwise((None, *steps)) if step is not None]
    found = history.inner_products(spans) if history.names and steps else {}
    size = len(steps)
    grams = torch.stack([found[name] for name in history.names]) if found else torch.zeros(0, size, size).double()
    return Trajectory(history.names if found else (), grid, grams)


def _some(values: list[int], most: int = MOST_HORIZONS) -> tuple[int, ...]:
    if len(values) <= most:
        return tuple(values)
    chosen = torch.linspace(0, len(values) - 1, most).round().int().tolist()
    return tuple(values[index] for index in chosen)

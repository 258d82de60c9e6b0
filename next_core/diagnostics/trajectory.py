"""A run as points in time, and the inner products of each matrix's steps, from which all linear figures follow."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from next_core.history.history import History
from next_core.types import Span

MOST_HORIZONS = 32
"""At most so many lags and horizons are measured, evenly chosen: unevenly spaced runs have many distinct ones."""
FEWEST_POINTS = 3  # A line must be fitted to at least so many points, the start among them, before it has to predict


@dataclass(frozen=True)
class Grid:
    """The moments of a run: N + 1 points in RL steps, the first of which is where RL began, and N intervals.

    ``wanted`` is a horizon that is measured even where it is not among the ``lags``.
    """

    times: tuple[int, ...]
    wanted: int | None = None

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
        return len({b - a for a, b in itertools.pairwise(self.times)}) <= 1

    @cached_property
    def lags(self) -> tuple[int, ...]:
        """The distinct distances between two points, in RL steps, up to half the span: longer ones have few pairs."""
        distances = {b - a for a, b in itertools.combinations(self.times, 2) if 2 * (b - a) <= self.span}
        return spread_out(sorted(distances), MOST_HORIZONS)

    @cached_property
    def horizons(self) -> tuple[int, ...]:
        """The lags, and ``wanted``, at which a line fitted to ``FEWEST_POINTS`` or more points meets a later point."""
        wanted = () if self.wanted is None else (self.wanted,)
        return tuple(lag for lag in sorted({*self.lags, *wanted}) if self.targets(lag))

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


def read_grams(history: History) -> Tensor:
    """Return the inner products <x_i, x_j> of each moving matrix's steps x_i = W_i - W_{i-1}, fp64, (M, N, N).

    The steps between neighbouring checkpoints are read directly, so that nothing cancels. Raises what the source
    raises: ``CheckpointError`` for values that are not finite or a missing backbone.
    """
    steps = measured_steps(history)
    spans: list[Span] = list(zip(steps, (None, *steps), strict=False))
    found = history.inner_products(spans)
    return torch.stack([found[name] for name in history.names])


def measured_steps(history: History) -> tuple[int, ...]:
    """Return the observed steps but step 0, which is where RL began and so the start itself."""
    return tuple(step for step in history.steps if step > history.source.origin)


def spread_out(values: Sequence[int], most: int) -> tuple[int, ...]:
    """Return at most so many of some values, evenly chosen, the first and the last among them."""
    chosen = torch.linspace(0, len(values) - 1, min(most, len(values))).round().int().tolist()
    return tuple(values[index] for index in chosen)

"""How a matrix moves: the angle between successive steps, how fast displacement grows, and whether it slows down."""

from __future__ import annotations

import torch
from torch import Tensor

from next_core.diagnostics.linearity import share
from next_core.diagnostics.trajectory import Grid, apply_forms


def successive_cosines(grams: Tensor) -> Tensor:
    """<x_i, x_{i-1}> / (|x_i| |x_{i-1}|) of successive steps: (..., N - 1). NaN where the matrix stood still."""
    squares = grams.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    lengths = (squares[..., 1:] * squares[..., :-1]).sqrt()
    return share(grams.diagonal(offset=1, dim1=-2, dim2=-1), lengths)


def mean_squared_displacement(grams: Tensor, grid: Grid) -> Tensor:
    """Mean of |W_j - W_i|^2 over the points (i, j) that lie one lag apart, for each of ``grid.lags``: (..., lags)."""
    at = torch.eye(len(grid.times), dtype=torch.float64)
    forms = []
    for lag in grid.lags:
        pairs = grid.pairs(lag)
        forms.append(grid.form(torch.stack([at[j] - at[i] for i, j in pairs])) / len(pairs))
    return apply_forms(grams, forms)


def displacement_exponent(displacement: Tensor, grid: Grid) -> Tensor:
    """Slope of log MSD against log lag: 1 for a random walk, 2 for a straight line, (...).

    Each lag counts by the number of its pairs, so that unevenly spaced checkpoints need no grid. NaN where some MSD
    is zero.
    """
    weights = torch.tensor([float(len(grid.pairs(lag))) for lag in grid.lags], dtype=torch.float64)
    weights = weights / weights.sum()
    x = torch.tensor(grid.lags, dtype=torch.float64).log()
    x = x - (weights * x).sum()
    y = torch.where(displacement > 0, displacement, torch.nan).log()
    slope: Tensor = (y @ (weights * x)) / (weights * x.square()).sum()
    return slope


def straightness(grams: Tensor) -> Tensor:
    """|W_N - W_0| / sum |x_i|: 1 on a straight line, about 1 / sqrt(N) for equal steps of a random walk, (...)."""
    net = grams.sum((-2, -1)).clamp_min(0).sqrt()
    return share(net, grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().sum(-1))


def speed(grams: Tensor, grid: Grid) -> Tensor:
    """Frobenius norm of each step per RL step, (..., N)."""
    return grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt() / grid.t.diff()


def speed_ratio(speeds: Tensor) -> Tensor:
    """Mean speed over the last third of the intervals by that over the first third: below 1, motion slows; (...)."""
    third = speeds.shape[-1] // 3
    return share(speeds[..., -third:].mean(-1), speeds[..., :third].mean(-1))

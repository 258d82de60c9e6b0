"""Figures that follow from inner products of a matrix's steps: straightness in time, angles, displacement, speed.

``grams`` are Gram matrices (..., N, N) of the N steps x_i = W_i - W_{i-1} between the points of a ``Grid``.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from next_core.diagnostics.random_walks import median
from next_core.diagnostics.trajectory import Grid

OUT_OF_SAMPLE = ("line_skill", "pinned_skill", "line_r2_out")
Over = Literal["step", "horizon", "lag"]


class Curve(NamedTuple):
    """A figure over steps, horizons or lags: ``x`` (L,), ``values`` (..., L), the medians of walks ``draws`` (D, L)."""

    over: Over
    x: tuple[int, ...]
    values: Tensor
    draws: Tensor | None = None


def gram_figures(
    grams: Tensor, grid: Grid, horizon: int | None, components: bool = True
) -> tuple[dict[str, Tensor], dict[str, Curve]]:
    """Return figures (...,) and curves, as many as N steps allow.

    Without ``components`` the figures of the SVD over time are left out: their cost grows with the cube of N.
    """
    speeds = speed(grams, grid)
    figures: dict[str, Tensor] = {}
    curves = {"speed": Curve("step", grid.times[1:], speeds)}
    if grid.intervals >= 2:
        figures |= line_in_sample(grams, grid) | (time_components(grams, grid) if components else {})
        figures["straightness"] = straightness(grams)
        cosines = successive_cosines(grams)
        figures["cosine_local"], curves["cosine_local"] = median(cosines), Curve("step", grid.times[2:], cosines)
    if grid.intervals >= 3:
        figures["speed_ratio"] = speed_ratio(speeds)
    for name, value in walk_forward(grams, grid).items():
        curves[name] = Curve("horizon", grid.horizons, value)
        if horizon in grid.horizons:
            figures[name] = value[..., grid.horizons.index(horizon)]
    if len(grid.lags) >= 2:
        displacement = mean_squared_displacement(grams, grid)
        figures["msd_exponent"] = displacement_exponent(displacement, grid)
        curves["msd"] = Curve("lag", grid.lags, share(displacement, displacement[..., :1]))
    return figures, curves


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole; NaN where the whole is zero."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), torch.nan)


def step_lengths(grams: Tensor) -> Tensor:
    """Return the norm of each step, (..., N)."""
    return grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()


def time_components(grams: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Decompose the stacked global deltas G_1 ... G_N over time, uncentred (RELEX, arXiv 2605.21468); N >= 2.

    With M M^T = Q diag(s^2) Q^T and c_1 = s_1 q_1: ``c1_r2``, R2 of c_1 fitted by a + b t, in sample, for N >= 3;
    ``top_1_share`` = s_1^2 / sum s^2; for N >= 6 ``top_5_share``, the same of the first five, and ``top_1_of_top_5`` =
    s_1^2 / (s_1^2 + ... + s_5^2).
    """
    positions = grams.cumsum(-1).cumsum(-2)  # <G_i, G_j>: G_i is the sum of the first i steps
    squares, vectors = torch.linalg.eigh(positions)
    squares = squares.clamp_min(0)
    total, first, five = squares.sum(-1), squares[..., -1], squares[..., -5:].sum(-1)
    found = {"top_1_share": share(first, total)}
    if grid.intervals >= 6:
        found |= {"top_5_share": share(five, total), "top_1_of_top_5": share(first, five)}
    if grid.intervals >= 3:
        t = grid.t[1:] - grid.t[1:].mean()
        c = vectors[..., -1] - vectors[..., -1].mean(-1, keepdim=True)
        explained = share((c @ t).square(), c.square().sum(-1) * t.square().sum())
        found["c1_r2"] = torch.where(first > 0, explained, torch.nan)
    return found


def line_in_sample(grams: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit one line a + b t to all points W_0 ... W_N: ``line_r2`` = 1 - SSE / sum |W_i - mean|^2; N >= 3."""
    if grid.intervals < 3:
        return {}
    points = len(grid.times)
    identity, t = torch.eye(points, dtype=torch.float64), grid.t - grid.t.mean()
    centre = identity - 1 / points
    sums = apply_forms(grams, [grid.form(centre - torch.outer(t, t) / t.square().sum()), grid.form(centre)])
    return {"line_r2": 1 - share(sums[..., 0], sums[..., 1])}


def walk_forward(grams: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit a line to all points up to t and predict t + h, at every t with ``FEWEST_POINTS`` or more: (..., H).

    H are ``grid.horizons``. Squared errors are summed over the targets of one horizon, then
    ``line_skill`` = 1 - SSE(line) / SSE(stay): the line a + b (t + h) against staying at W_t;
    ``pinned_skill``: the same of W_t + b h, the fitted slope put at the newest point;
    ``line_r2_out`` = 1 - SSE(line) / sum |W_j - mean of the targets|^2; NaN for a single target, its own mean.
    """
    if not grid.horizons:
        return {}
    forms: list[Tensor] = []
    for horizon in grid.horizons:
        rows = [_error_rows(grid, i, j) for i, j in grid.targets(horizon)]
        line, pinned, stay, target = (torch.stack(kind) for kind in zip(*rows, strict=True))
        forms += [grid.form(kind) for kind in (line, pinned, stay, target - target.mean(0))]
    line, pinned, stay, spread = (apply_forms(grams, forms[kind::4]) for kind in range(4))
    return {
        "line_skill": 1 - share(line, stay),
        "pinned_skill": 1 - share(pinned, stay),
        "line_r2_out": 1 - share(line, spread),
    }


def _error_rows(grid: Grid, i: int, j: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return coefficients over the points of line - W_j, pinned - W_j, W_i - W_j, and W_j - W_0."""
    seen = grid.t[: i + 1]
    t = seen - seen.mean()
    slope, at = torch.zeros_like(grid.t), torch.eye(len(grid.t), dtype=torch.float64)
    slope[: i + 1] = t / t.square().sum()
    mean = torch.zeros_like(grid.t)
    mean[: i + 1] = 1 / len(seen)
    line = mean + (grid.t[j] - seen.mean()) * slope
    pinned = at[i] + (grid.t[j] - grid.t[i]) * slope
    return line - at[j], pinned - at[j], at[i] - at[j], at[j] - at[0]


def successive_cosines(grams: Tensor) -> Tensor:
    """Return <x_i, x_{i-1}> / (|x_i| |x_{i-1}|), (..., N - 1); NaN where the matrix stood still."""
    squares = grams.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    lengths = (squares[..., 1:] * squares[..., :-1]).sqrt()
    return share(grams.diagonal(offset=1, dim1=-2, dim2=-1), lengths)


def mean_squared_displacement(grams: Tensor, grid: Grid) -> Tensor:
    """Return the mean of |W_j - W_i|^2 over the points (i, j) one lag apart, for each of ``grid.lags``: (..., lags)."""
    at = torch.eye(len(grid.times), dtype=torch.float64)
    pairs = [grid.pairs(lag) for lag in grid.lags]
    return apply_forms(grams, [grid.form(torch.stack([at[j] - at[i] for i, j in some])) / len(some) for some in pairs])


def displacement_exponent(displacement: Tensor, grid: Grid) -> Tensor:
    """Return the slope of log MSD against log lag, (...): 1 for a random walk, 2 for a straight line.

    Each lag counts by the number of its pairs, so unevenly spaced checkpoints need no grid. NaN where an MSD is zero.
    """
    weights = torch.tensor([float(len(grid.pairs(lag))) for lag in grid.lags], dtype=torch.float64)
    weights = weights / weights.sum()
    x = torch.tensor(grid.lags, dtype=torch.float64).log()
    x = x - (weights * x).sum()
    y = torch.where(displacement > 0, displacement, torch.nan).log()
    slope: Tensor = (y @ (weights * x)) / (weights * x.square()).sum()
    return slope


def straightness(grams: Tensor) -> Tensor:
    """Return |W_N - W_0| / sum |x_i|, (...): 1 on a straight line, about 1 / sqrt(N) on a walk of equal steps."""
    return share(grams.sum((-2, -1)).clamp_min(0).sqrt(), step_lengths(grams).sum(-1))


def speed(grams: Tensor, grid: Grid) -> Tensor:
    """Return the Frobenius norm of each step per RL step, (..., N)."""
    return step_lengths(grams) / grid.t.diff()


def speed_ratio(speeds: Tensor) -> Tensor:
    """Return the mean speed over the last third of the intervals by that over the first third, (...)."""
    third = speeds.shape[-1] // 3
    return share(speeds[..., -third:].mean(-1), speeds[..., :third].mean(-1))


def apply_forms(grams: Tensor, forms: list[Tensor]) -> Tensor:
    """Return <form_f, K> for each Gram matrix K (..., N, N) and each of F forms (N, N): (..., F)."""
    return grams.flatten(-2) @ torch.stack(forms).flatten(1).T

"""How far the motion is a straight line in time: in sample, and out of sample by walking forward."""

from __future__ import annotations

import torch
from torch import Tensor

from next_core.diagnostics.trajectory import Grid, apply_forms


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; NaN where the whole is zero."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), torch.nan)


def time_components(grams: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The time SVD of the stacked deltas G_1 ... G_N, uncentred (RELEX, arXiv 2605.21468), from Gram matrices.

    ``grams`` (..., N, N) of the steps, N >= 2. With M M^T = Q diag(s^2) Q^T and c_1 = s_1 q_1:
    ``c1_r2``, R2 of c_1 fitted by a + b t, in sample, for N >= 3; ``top_1_share`` = s_1^2 / sum s^2;
    for N >= 6 ``top_5_share``, the same of the first five, and ``top_1_of_top_5`` = s_1^2 / (s_1^2 + ... + s_5^2).
    """
    positions = grams.cumsum(-1).cumsum(-2)
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
    """``line_r2``: R2 of all points W_0 ... W_N fitted by one line a + b t, 1 - SSE / sum |W_i - mean|^2; N >= 3."""
    if grid.intervals < 3:
        return {}
    points = len(grid.times)
    identity, t = torch.eye(points, dtype=torch.float64), grid.t - grid.t.mean()
    centre = identity - 1 / points
    sums = apply_forms(grams, [grid.form(centre - torch.outer(t, t) / t.square().sum()), grid.form(centre)])
    return {"line_r2": 1 - share(sums[..., 0], sums[..., 1])}


def walk_forward(grams: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit on all points up to t, predict at t + h, for every t that has ``FEWEST_POINTS`` or more: (..., H).

    H are ``grid.horizons``. Squared errors are summed over the targets of one horizon, then
    ``line_skill`` = 1 - SSE(line) / SSE(stay): the line a + b (t + h) against staying at W_t;
    ``pinned_skill``: the same of W_t + b h, the fitted slope put at the newest point;
    ``line_r2_out`` = 1 - SSE(line) / sum |W_j - mean of the targets|^2; NaN where there is one
    target, which is its own mean.
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
    """Coefficients over the points of: line - W_j, pinned - W_j, W_i - W_j, and W_j - W_0."""
    seen = grid.t[: i + 1]
    t = seen - seen.mean()
    slope, at = torch.zeros_like(grid.t), torch.eye(len(grid.t), dtype=torch.float64)
    slope[: i + 1] = t / t.square().sum()
    mean = torch.zeros_like(grid.t)
    mean[: i + 1] = 1 / len(seen)
    line = mean + (grid.t[j] - seen.mean()) * slope
    pinned = at[i] + (grid.t[j] - grid.t[i]) * slope
    return line - at[j], pinned - at[j], at[i] - at[j], at[j] - at[0]

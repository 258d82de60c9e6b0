"""What the measured code is held against, written afresh and plainly: the dense way, and an exact one for errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.clock import Cost, cost_of
from benchmarks.speed.synthetic import HORIZON, seeded

Span = tuple[int, int | None]
"""A delta: up to a step, since another; None is the backbone."""
Triplet = tuple[Tensor, ...]
"""u, sigma, v."""


def spans(steps: Sequence[int], horizon: int = HORIZON) -> dict[str, list[Span]]:
    """The deltas of one matrix. The first local one is the first global one."""
    return {
        "global": [(step, None) for step in steps],
        "local": [(step, before) for before, step in itertools.pairwise((None, *steps)) if step is not None],
        "target": [(step + horizon, step) for step in steps if step + horizon in steps],
    }


def different_spans(steps: Sequence[int], horizon: int = HORIZON) -> list[Span]:
    """All of them, each once."""
    return list(dict.fromkeys(span for kind in spans(steps, horizon).values() for span in kind))


def dense_svds(folder: Path, wanted: dict[str, list[Span]]) -> dict[str, Any]:
    """As the released scripts go about it: merge W_0 + s B A, subtract, decompose, one delta after another.

    ``wanted`` names the matrices and their deltas. Returns the seconds of each merge and each SVD by shape, and the
    triplets. All in fp32; the merge is paid once for each checkpoint that a matrix's deltas touch.
    """
    from next_core import open_checkpoints

    source = open_checkpoints(folder)
    shapes = {parameter.name: parameter.shape for parameter in source.parameters}
    costs: dict[str, dict[tuple[int, int], list[Cost]]] = {"merge": {}, "svd": {}}
    found: dict[tuple[str, Span], Any] = {}
    torch.linalg.svd(torch.ones(8, 8))  # loading LAPACK is an import
    for name, deltas in wanted.items():
        m, n = shapes[name]
        backbone = 0.02 * torch.randn(m, n, generator=seeded(name))
        weights: dict[int | None, Tensor] = {None: backbone}
        for step in {step for span in deltas for step in span if step is not None}:
            at = source.factors(name, step)
            assert at is not None
            cost, weights[step] = cost_of(lambda at=at, backbone=backbone: backbone + at.scaling * (at.B @ at.A))  # type: ignore[misc]
            costs["merge"].setdefault((m, n), []).append(cost)
        for step, since in deltas:
            later, before = weights[step], weights[since]
            cost, (U, S, Vh) = cost_of(lambda a=later, b=before: torch.linalg.svd(a - b, full_matrices=False))  # type: ignore[misc]
            costs["svd"].setdefault((m, n), []).append(cost)
            found[name, (step, since)] = tuple(x.double().numpy() for x in (U[:, 0], S[0], Vh[0]))
    return {"costs": costs, "triplets": found}


def extrapolated(costs: dict[str, Any], shapes: Iterable[tuple[int, int]], merges: int, svds: int) -> float:
    """CPU-seconds of all matrices from the mean seconds of each shape's sample."""
    mean: dict[str, dict[tuple[int, int], float]] = {
        what: {shape: sum(cost.cpu for cost in some) / len(some) for shape, some in by_shape.items()}
        for what, by_shape in costs.items()
    }
    return sum(merges * mean["merge"][shape] + svds * mean["svd"][shape] for shape in shapes)


def exact_triplet(later: Any, earlier: Any) -> Triplet:
    """sigma_1, u_1, v_1 of s B_t A_t - s B_s A_s in fp64, by Householder QR of the thin factors side by side."""
    left, right = later.scaling * later.B.double(), later.A.double()
    if earlier is not None:
        left = torch.cat([left, -earlier.scaling * earlier.B.double()], 1)
        right = torch.cat([right, earlier.A.double()], 0)
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ U[:, 0], S[0], q_right @ Vh[0]


def errors(found: Triplet, truth: Triplet) -> dict[str, float]:
    """Relative error of sigma, and the sine of the angle of u and of v (1 - |cos| says nothing below 1e-8)."""
    (u, sigma, v), (u_true, sigma_true, v_true) = found, truth
    return {
        "sigma": float(abs(sigma - sigma_true) / sigma_true),
        "u": sine(u, u_true),
        "v": sine(v, v_true),
        "one_minus_cos": 1 - float(abs(u.double() @ u_true.double()) / (u.double().norm() * u_true.double().norm())),
    }


def sine(x: Tensor, y: Tensor) -> float:
    """The sine of the angle between two lines, exact for small angles."""
    x, y = x.double() / x.double().norm(), y.double() / y.double().norm()
    return float(min((x - y).norm(), (x + y).norm(), torch.tensor(math.sqrt(2))))


def worst(all_errors: Iterable[dict[str, float]]) -> dict[str, float]:
    """The largest of each kind of error."""
    listed = list(all_errors)
    return {key: float(f"{max(errors[key] for errors in listed):.2g}") for key in listed[0]}

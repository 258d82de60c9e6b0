"""How far each delta is one direction, and whether that direction stays: figures of singular triplets and their null.

The null depends on how a matrix is stored, so it is drawn per class of equal shape and rank.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from next_core.diagnostics.trajectory import measured_steps
from next_core.errors import CheckpointError
from next_core.history.history import DeltaKind, History
from next_core.mathematics.low_rank import Factors, LowRank, lora_difference, truncated_svd
from next_core.types import LoraFactors

KINDS: tuple[DeltaKind, ...] = ("global", "local")
LORA_DRAWS = 8  # Walks of factors per class of matrices (one shape, one rank): the figures vary little between them
DENSE_DRAWS = 100
MOST_SAMPLED = 1024
"""Dense matrices of up to this many entries are drawn; for larger ones the limits of large matrices are good."""
TRACY_WIDOM = (-1.2065, 1.2680)
"""Mean and standard deviation of the law of the largest eigenvalue of a real Wishart matrix."""


def triplet_figures(history: History) -> dict[str, Tensor]:
    """Per figure (M, T), T checkpoints after the start; NaN where it is not defined or the spectrum is not known.

    For global and local deltas: ``energy_ratio_*`` = sigma_1 / sum sigma (NExt, arXiv 2604.11446),
    ``squared_energy_ratio_*`` = sigma_1^2 / sum sigma^2, ``cosine_u_*`` and ``cosine_v_*`` = |cos| of the leading left
    and right singular vectors with those of the checkpoint before; their first column is NaN.
    """
    rows = slice(len(history.steps) - len(measured_steps(history)), None)
    found: dict[str, Tensor] = {}
    history.compress(*KINDS)
    for kind in KINDS:
        components = history.components(kind, align=False)
        each = [figures_of(components[name], rows) for name in history.names]
        for figure in each[0] if each else ():
            found[f"{figure}_{kind}"] = torch.stack([one[figure] for one in each])
    return found


def figures_of(factors: Factors, rows: slice = slice(None)) -> dict[str, Tensor]:
    """The four figures of one kind of delta, each (..., T), of ``Factors`` with leading dimensions (..., T)."""
    sigma, energy = factors.S[..., 0].double(), factors.energy.double()
    nothing = torch.full_like(energy, torch.nan)
    ratio = nothing if factors.nuclear is None else factors.energy_ratio.double()
    moved = (energy > 0) & (sigma > 0)
    cosines = {f"cosine_{side}": _turning(x[..., 0]) for side, x in (("u", factors.U), ("v", factors.V))}
    found = {
        "energy_ratio": torch.where(moved, ratio, torch.nan),
        "squared_energy_ratio": torch.where(moved, factors.squared_energy_ratio.double(), torch.nan),
    } | cosines
    return {figure: value[..., rows] for figure, value in found.items()}


def _turning(vectors: Tensor) -> Tensor:
    """|<x_t, x_{t-1}>| of vectors (..., T, m) of unit norm or zero: (..., T), NaN first and where one is zero."""
    vectors = vectors.double()
    cosine = (vectors[..., 1:, :] * vectors[..., :-1, :]).sum(-1).abs().clamp_max(1)
    there = vectors.square().sum(-1) > 0.5
    cosine = torch.where(there[..., 1:] & there[..., :-1], cosine, torch.nan)
    return torch.nn.functional.pad(cosine, (1, 0), value=torch.nan)


def triplet_nulls(history: History, seed: int) -> dict[str, Tensor]:
    """Per figure of ``triplet_figures`` (draws, M, T); all matrices of a class share their draws. NaN: no null."""
    draws = LORA_DRAWS if all(history.ranks[name] is not None for name in history.names) else DENSE_DRAWS
    rng = np.random.default_rng(seed)
    classes: dict[tuple[tuple[int, int], int | None], list[int]] = {}
    for index, name in enumerate(history.names):
        classes.setdefault((history.shapes[name], history.ranks[name]), []).append(index)
    length, matrices = len(measured_steps(history)), len(history.names)
    found: dict[str, Tensor] = {}
    for (shape, rank), members in classes.items():
        if rank is None:
            drawn = dense_null(shape, length, draws, rng)
        else:
            picked = [members[draw * len(members) // LORA_DRAWS] for draw in range(LORA_DRAWS)]
            drawn = _lora_null(history, [history.names[index] for index in picked], rng)
        for figure, value in drawn.items():
            if figure not in found:
                found[figure] = torch.full((draws, matrices, length), torch.nan, dtype=torch.float64)
            found[figure][:, members] = value[torch.arange(draws) % len(value), None]
    return found


def _lora_null(history: History, names: Sequence[str], rng: np.random.Generator) -> dict[str, Tensor]:
    """One walk for each of ``names``, with its start and its step lengths: (len(names), T)."""
    each = []
    for name in names:
        path = _factor_path(history, name)
        if path is None:
            return {}
        A, B = (_walk_like(factor, rng) for factor in path)
        found: dict[str, Tensor] = {}
        for kind, past in (("global", slice(0, 1)), ("local", slice(0, -1))):
            figures = figures_of(truncated_svd(_differences(A, B, past), 1))
            found |= {f"{figure}_{kind}": value for figure, value in figures.items()}
        each.append(found)
    return {figure: torch.stack([one[figure] for one in each]) for figure in each[0]}


def _differences(A: Tensor, B: Tensor, past: slice) -> LowRank:
    """B_t A_t - B_s A_s at t = 1 ... T, s the points of ``past``, of A (T + 1, r, n) and B (T + 1, m, r)."""
    later, earlier = (A[1:], B[1:]), (A[past].expand_as(A[1:]), B[past].expand_as(B[1:]))
    return lora_difference(later, earlier, 1.0)


def _factor_path(history: History, name: str) -> tuple[Tensor, Tensor] | None:
    """A (T + 1, r, n) and B (T + 1, m, r) over time. Where step 0 was not kept, A starts as first seen, and B at 0."""
    now = [at for step in measured_steps(history) if (at := history.source.factors(name, step)) is not None]
    if len(now) < len(measured_steps(history)):
        return None
    try:
        start = history.source.factors(name, 0)
    except CheckpointError:
        start = None
    if start is None:
        start = LoraFactors(now[0].A, torch.zeros_like(now[0].B), now[0].scaling)
    return torch.stack([at.A for at in (start, *now)]).double(), torch.stack([at.B for at in (start, *now)]).double()


def _walk_like(path: Tensor, rng: np.random.Generator) -> Tensor:
    """A walk (T + 1, a, b) from where ``path`` starts, with steps of the same norms in random directions."""
    lengths = torch.linalg.matrix_norm(path.diff(dim=0))
    steps = torch.from_numpy(rng.standard_normal((len(path) - 1, *path.shape[1:])))
    steps = steps * (lengths / torch.linalg.matrix_norm(steps))[:, None, None]
    return torch.cat([path[:1], steps]).cumsum(0)


def dense_null(shape: tuple[int, int], length: int, draws: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Of a walk with iid Gaussian steps every delta, global or local, is an iid Gaussian matrix: (draws, length).

    Leading vectors of successive local deltas are independent directions; those of global deltas, which overlap, have
    no null here. Global deltas overlap in time, too: one draw serves all moments.
    """
    m, n = shape
    ratios = sampled if m * n <= MOST_SAMPLED else asymptotic
    found: dict[str, Tensor] = {}
    for kind, moments in (("global", 1), ("local", length)):
        squared, plain = (x.reshape(draws, moments).expand(draws, length) for x in ratios(m, n, draws * moments, rng))
        found |= {f"squared_energy_ratio_{kind}": squared, f"energy_ratio_{kind}": plain}
    for side, size in (("u", m), ("v", n)):
        one = rng.standard_normal((draws, length))
        rest = rng.chisquare(size - 1, (draws, length)) if size > 1 else np.zeros((draws, length))
        cosine = torch.from_numpy(np.abs(one) / np.sqrt(one**2 + rest))
        cosine[:, 0] = torch.nan
        found[f"cosine_{side}_local"] = cosine
    return found


def sampled(m: int, n: int, draws: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """sigma_1^2 / sum sigma^2 and sigma_1 / sum sigma of iid Gaussian (m, n) matrices, (draws,) each."""
    sigma = torch.linalg.svdvals(torch.from_numpy(rng.standard_normal((draws, m, n))))
    squares = sigma.square()
    return squares[:, 0] / squares.sum(-1), sigma[:, 0] / sigma.sum(-1)


def asymptotic(m: int, n: int, draws: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The same of large matrices, from the limit laws alone.

    With M >= N the larger and smaller side, sigma_1^2 = mu + s x, mu = (sqrt(M - 1) + sqrt(N))^2,
    s = sqrt(mu) (1 / sqrt(M - 1) + 1 / sqrt(N))^(1/3), x of Tracy and Widom's mean and deviation; sum sigma^2 = m n;
    sum sigma from ``mean_singular_value``.
    """
    a, b = math.sqrt(max(m, n) - 1), math.sqrt(min(m, n))
    x = TRACY_WIDOM[0] + TRACY_WIDOM[1] * torch.from_numpy(rng.standard_normal(draws))
    largest = (a + b) ** 2 + (a + b) * (1 / a + 1 / b) ** (1 / 3) * x
    plain = largest.sqrt() / (min(m, n) * mean_singular_value(m, n))
    return (largest / (m * n)).clamp_max(1), plain.clamp_max(1)


def mean_singular_value(m: int, n: int, points: int = 2000) -> float:
    """The mean of the min(m, n) singular values of an iid standard normal (m, n) matrix, by Marchenko and Pastur.

    With M >= N the larger and smaller side and y = N / M, x = sigma^2 / M has the density
    sqrt((b - x)(x - a)) / (2 pi y x) between a = (1 - sqrt(y))^2 and b = (1 + sqrt(y))^2.
    """
    large, y = max(m, n), min(m, n) / max(m, n)
    # x = 1 + y + 2 sqrt(y) cos(phi) takes the square root's ends out of the integral.
    phi = (torch.arange(points, dtype=torch.float64) + 0.5) * (math.pi / points)
    x = (1 + y + 2 * math.sqrt(y) * phi.cos()).clamp_min(1e-300)
    density = (2 * math.sqrt(y) * phi.sin()).square() / (2 * math.pi * y * x)
    return float((density * x.sqrt()).sum() / density.sum()) * math.sqrt(large)

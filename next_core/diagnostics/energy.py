"""How far each delta is one direction as a matrix, and whether that direction stays: figures of singular triplets."""

from __future__ import annotations

import torch
from torch import Tensor

from next_core.diagnostics.trajectory import measured_steps
from next_core.history.history import DeltaKind, History
from next_core.mathematics.low_rank import Factors

KINDS: tuple[DeltaKind, ...] = ("global", "local")


def energy_over_time(history: History) -> dict[str, Tensor]:
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
        each = [triplet_figures(components[name], rows) for name in history.names]
        for figure in each[0] if each else ():
            found[f"{figure}_{kind}"] = torch.stack([one[figure] for one in each])
    return found


def triplet_figures(factors: Factors, rows: slice = slice(None)) -> dict[str, Tensor]:
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

"""Weight deltas as an exact adapter with scaling 1: in a live model next to the trained adapter, or in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from next_core.mathematics.low_rank import LowRank


def factor_keys(name: str) -> tuple[str, str]:
    """Return the names of a parameter's A and B in PEFT's adapter files."""
    module = name.removesuffix(".weight")
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def balanced(delta: LowRank) -> tuple[Tensor, Tensor]:
    """Return A (k, n) and B (m, k) with B A = ``delta``, each scaled to the root of the norm.

    Rows of A then match columns of B in norm: neither overflows nor underflows in fp32 where the product does not.
    """
    balance = (delta.right.norm(dim=1) / delta.left.norm(dim=0).clamp_min(1e-300)).sqrt().clamp(1e-6, 1e6)
    return delta.right / balance[:, None], delta.left * balance[None, :]


def adapter_settings(deltas: Mapping[str, LowRank]) -> dict[str, Any]:
    """Return the fields of PEFT's ``LoraConfig`` for these deltas by parameter: their ranks, and scaling 1."""
    ranks = {name.removesuffix(".weight"): delta.rank for name, delta in deltas.items() if delta.rank > 0}
    rank = max(ranks.values(), default=1)
    pattern = {module: r for module, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,  # alpha / r = 1: the factors carry the whole delta
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def adapter_tensors(deltas: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the fp32 tensors of the adapter's file by PEFT's names; deltas of rank 0 are left out."""
    return {
        key: value.float().contiguous()
        for name, delta in deltas.items()
        if delta.rank > 0
        for key, value in zip(factor_keys(name), balanced(delta), strict=True)
    }

"""Displacements as an adapter of their own, with scaling 1, exactly: beside the trained one, live or in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from next_core.mathematics.low_rank import LowRank


def balanced(move: LowRank) -> tuple[Tensor, Tensor]:
    """A (k, n) and B (m, k) with B A = ``move``; both carry the root of the norm, so that none over- or underflows."""
    balance = (move.right.norm(dim=1) / move.left.norm(dim=0).clamp_min(1e-300)).sqrt().clamp(1e-6, 1e6)
    return move.right / balance[:, None], move.left * balance[None, :]


def adapter_settings(moves: Mapping[str, LowRank]) -> dict[str, Any]:
    """The fields of PEFT's ``LoraConfig`` that fit the weight_deltas of these weights: ranks, and scaling 1."""
    ranks = {name.removesuffix(".weight"): move.rank for name, move in moves.items() if move.rank > 0}
    rank = max(ranks.values(), default=1)
    pattern = {module: r for module, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,  # scaling 1: the weight_delta is in the factors
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def adapter_tensors(moves: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The fp32 tensors of the adapter's file, by PEFT's names."""
    tensors = {}
    for name, move in moves.items():
        if move.rank > 0:
            for side, value in zip("AB", balanced(move), strict=True):
                module = name.removesuffix(".weight")
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = value.float().contiguous()
    return tensors

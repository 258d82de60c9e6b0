"""Weight deltas as an exact adapter with scaling 1: in a live model next to the trained adapter, or in files."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from next_core.errors import unsupported
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_tensors import factor_keys, is_expert


def rank_settings(used: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of PEFT's ``LoraConfig`` that give each target its own rank and scaling 1, and no other target.

    PEFT reads a pattern as a regular expression that may begin after any dot: "head" would match "lm.head" too.
    """
    ranks = {f"^{re.escape(target)}": rank for target, rank in used.items()}
    common = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]), default=(1, 0))[0]
    others = {target: rank for target, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }


def balanced(delta: LowRank) -> tuple[Tensor, Tensor]:
    """Return A (k, n) and B (m, k) with B A = ``delta``, each scaled to the root of the norm.

    Rows of A then match columns of B in norm: neither overflows nor underflows in fp32 where the product does not.
    """
    balance = (delta.right.norm(dim=1) / delta.left.norm(dim=0).clamp_min(1e-300)).sqrt().clamp(1e-6, 1e6)
    return delta.right / balance[:, None], delta.left * balance[None, :]


def adapter_settings(deltas: Mapping[str, LowRank]) -> dict[str, Any]:
    """Return the fields of PEFT's ``LoraConfig`` for these deltas by parameter: their ranks, and scaling 1.

    Raises ``BackendError`` for the experts of a fused layer.
    """
    expert = next(filter(is_expert, deltas), None)
    if expert is not None:
        raise unsupported(
            f"'{expert}' is one expert of a fused layer, which an adapter of its own cannot move: use a coefficient "
            "predictor with space: factors"
        )
    moved = {name.removesuffix(".weight"): delta.rank for name, delta in deltas.items() if delta.rank > 0}
    return {
        **rank_settings(moved),
        # A regular expression, which PEFT compares with whole names; a list would match their endings too.
        "target_modules": "|".join(map(re.escape, sorted(moved))),
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def adapter_tensors(deltas: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the fp32 tensors of the adapter's file by PEFT's names; deltas of rank 0 are left out."""
    return {
        key: value.float().contiguous()
        for name, delta in deltas.items()
        if delta.rank > 0
        for key, value in zip(factor_keys(name.removesuffix(".weight")), balanced(delta), strict=True)
    }

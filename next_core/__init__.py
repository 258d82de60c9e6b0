"""next-core: watch an RLVR run through its checkpoints, predict where the weights are going, jump, check, go on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from next_core.errors import NextCoreError
    from next_core.history import History, MatrixHistory
    from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
    from next_core.lowrank import Factors, LowRank
    from next_core.per_matrix import Abstain, matrix_predictor
    from next_core.plugins import make_applier, make_compressor, make_predictor, registry
    from next_core.sources.opening import open_checkpoints

_WHERE = {
    "Abstain": "per_matrix",
    "CoefficientUpdate": "interfaces",
    "Factors": "lowrank",
    "History": "history",
    "LowRank": "lowrank",
    "LowRankUpdate": "interfaces",
    "MatrixHistory": "history",
    "NextCoreError": "errors",
    "Prediction": "interfaces",
    "make_applier": "plugins",
    "make_compressor": "plugins",
    "make_predictor": "plugins",
    "matrix_predictor": "per_matrix",
    "open_checkpoints": "sources.opening",
    "registry": "plugins",
}
__all__ = [
    "Abstain",
    "CoefficientUpdate",
    "Factors",
    "History",
    "LowRank",
    "LowRankUpdate",
    "MatrixHistory",
    "NextCoreError",
    "Prediction",
    "make_applier",
    "make_compressor",
    "make_predictor",
    "matrix_predictor",
    "open_checkpoints",
    "registry",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `next-core --help` must not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'next_core' has no attribute '{name}'")
    return getattr(importlib.import_module(f"next_core.{_WHERE[name]}"), name)

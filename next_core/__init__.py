"""next-core: watch an RLVR run through its checkpoints, predict where the weights are going, jump, check, go on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from next_core.checkpoints import open_checkpoints
    from next_core.errors import NextCoreError
    from next_core.history.history import History, MatrixHistory
    from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
    from next_core.mathematics.low_rank import Factors, LowRank
    from next_core.plugins import make_applier, make_compressor, make_predictor, registry
    from next_core.predictor import Abstain, matrix_predictor

_WHERE = {
    "Abstain": "predictor",
    "CoefficientUpdate": "interfaces",
    "Factors": "mathematics.low_rank",
    "History": "history.history",
    "LowRank": "mathematics.low_rank",
    "LowRankUpdate": "interfaces",
    "MatrixHistory": "history.history",
    "NextCoreError": "errors",
    "Prediction": "interfaces",
    "make_applier": "plugins",
    "make_compressor": "plugins",
    "make_predictor": "plugins",
    "matrix_predictor": "predictor",
    "open_checkpoints": "checkpoints",
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

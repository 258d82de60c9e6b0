"""next-core: watch an RLVR run, predict where its weights are going, jump there, check the jump, continue.

Everything public is an attribute of this package and is imported on first use: ``import next_core as nc``.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from next_core.checkpoints import open_checkpoints as open_checkpoints
    from next_core.config import load_config as load_config
    from next_core.errors import NextCoreError as NextCoreError
    from next_core.history.history import History as History
    from next_core.history.history import MatrixHistory as MatrixHistory
    from next_core.interfaces import CoefficientUpdate as CoefficientUpdate
    from next_core.interfaces import LowRankUpdate as LowRankUpdate
    from next_core.interfaces import Prediction as Prediction
    from next_core.live_weights.logits_extrapolation import generate_extrapolated as generate_extrapolated
    from next_core.mathematics.low_rank import Factors as Factors
    from next_core.mathematics.low_rank import LowRank as LowRank
    from next_core.notebook import RecordedRun as RecordedRun
    from next_core.notebook import analyze as analyze
    from next_core.notebook import backtest as backtest
    from next_core.notebook import extrapolate as extrapolate
    from next_core.notebook import open_run as open_run
    from next_core.plugins import make_applier as make_applier
    from next_core.plugins import make_compressor as make_compressor
    from next_core.plugins import make_predictor as make_predictor
    from next_core.plugins import registry as registry
    from next_core.predictor import Abstain as Abstain
    from next_core.predictor import PerMatrixPredictor as PerMatrixPredictor
    from next_core.predictor import TrajectoryPredictor as TrajectoryPredictor
    from next_core.predictor import matrix_predictor as matrix_predictor
    from next_core.settings import Settings as Settings
    from next_core.step_predictor import StepConfig as StepConfig
    from next_core.step_predictor import StepHistory as StepHistory
    from next_core.step_predictor import StepPredictor as StepPredictor
    from next_core.step_predictor import StepScale as StepScale
    from next_predictors.adaptive_secant import AdaptiveSecant as AdaptiveSecant
    from next_predictors.alpharl import AlphaRL as AlphaRL
    from next_predictors.effopd import EffOPD as EffOPD
    from next_predictors.ema_pull import EmaPull as EmaPull
    from next_predictors.expo import Expo as Expo
    from next_predictors.next_mlp import NextMLP as NextMLP
    from next_predictors.next_mlp_reduced import NextMLPReduced as NextMLPReduced
    from next_predictors.random_direction import RandomDirection as RandomDirection
    from next_predictors.re_grounding import ReGrounding as ReGrounding
    from next_predictors.relex import Relex as Relex
    from next_predictors.ridge import Ridge as Ridge
    from next_predictors.rl_extra import RLExtra as RLExtra
    from next_predictors.secant import Secant as Secant
    from next_predictors.snoo import Snoo as Snoo
    from next_predictors.stay import Stay as Stay

_IMPORTS = (node for node in ast.walk(ast.parse(Path(__file__).read_text("utf-8"))) if isinstance(node, ast.ImportFrom))
_HOME = {name.asname: node.module for node in _IMPORTS for name in node.names if node.module and name.asname}
"""The module of each public name, from the imports above, which type checkers read."""
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `next-core --help` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'next_core' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

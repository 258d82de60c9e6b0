"""The interfaces of sources, compressors, appliers and rewards, and the values they exchange."""

from next_core.interfaces.checkpoint_source import CheckpointSource
from next_core.interfaces.compressor import Compressor
from next_core.interfaces.prediction import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.interfaces.reward import Reward
from next_core.interfaces.weight_applier import Applied, WeightApplier

__all__ = [
    "Applied",
    "CheckpointSource",
    "CoefficientUpdate",
    "Compressor",
    "LowRankUpdate",
    "Prediction",
    "Reward",
    "Update",
    "WeightApplier",
]

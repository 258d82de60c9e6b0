"""What is going on in a run's weights: geometry over time, each figure beside its random-walk null."""

from next_core.diagnostics.analysis import analyze
from next_core.diagnostics.analysis_results import Analysis, Precision
from next_core.diagnostics.figures import FIGURES, Figure, Group, Null, Series
from next_core.diagnostics.learning_rate import LearningRate, learning_rate_factor, run_advice
from next_core.sources.source_views import FromFirstCheckpoint, with_origin

__all__ = [
    "FIGURES",
    "Analysis",
    "Figure",
    "FromFirstCheckpoint",
    "Group",
    "LearningRate",
    "Null",
    "Precision",
    "Series",
    "analyze",
    "learning_rate_factor",
    "run_advice",
    "with_origin",
]

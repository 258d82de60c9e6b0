"""Equal-budget races of predictors against plain RL and its controls, on a real trainer, the seeds paired."""

from next_core.comparison.comparison_config import CompareConfig, load_comparison
from next_core.comparison.execution import compare

__all__ = ["CompareConfig", "compare", "load_comparison"]

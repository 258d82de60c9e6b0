"""The end of a run: the mean of its last checkpoints, where the steps just before are too large to come closer."""

from __future__ import annotations

from next_core.interfaces import CheckpointSource, CoefficientUpdate, Prediction


def windows(average: int, every: int) -> list[int]:
    """How many RL steps the means reach back that are tried: ``average``, a half and a quarter of it."""
    return sorted({window for window in (average // 4, average // 2, average) if window >= 2 * every})


def mean_of_last(source: CheckpointSource, window: int) -> Prediction:
    """From the newest checkpoint to the mean of those of the last ``window`` steps: of A and B each, where it is LoRA.

    Weight averaging at a large learning rate: arXiv 2306.03241. Jumps within the window count in full.
    """
    newest = source.steps[-1]
    steps = [step for step in source.steps if step > newest - window]
    weights = {step: 1.0 / len(steps) for step in steps}
    weights[newest] -= 1.0
    updates = {
        parameter.name: CoefficientUpdate(weights, "merged" if parameter.rank is None else "factors")
        for parameter in source.parameters
    }
    return Prediction(source, newest, 0, updates=updates)

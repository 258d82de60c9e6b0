"""The mean of a run's last checkpoints: closer to the optimum where single steps are too large to converge."""

from collections.abc import Callable, Sequence

from next_core.cycle.journal import Journal
from next_core.cycle.jump import failure
from next_core.cycle.probes import Probes
from next_core.interfaces import Applied, CheckpointSource, CoefficientUpdate, Prediction


def windows(average: int, every: int) -> list[int]:
    """Return the windows, in last RL steps, to try a mean over: ``average``, its half and its quarter."""
    return sorted({window for window in (average // 4, average // 2, average) if window >= 2 * every})


def mean_of_last(source: CheckpointSource, window: int) -> Prediction:
    """Return the move from the newest checkpoint to the mean of those of the last ``window`` steps.

    LoRA: the mean of A and the mean of B. Weight averaging at a large learning rate: arXiv 2306.03241. Jumps within the
    window count in full.
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


def end_in_mean(
    apply: Callable[[int], Applied],
    rollback: Callable[[Applied], None],
    probes: Probes,
    journal: Journal,
    step: int,
    choices: Sequence[int],
    unmeasured: int | None,
) -> None:
    """Move to the mean over the window, one of ``choices``, that validates best, if it beats the last step.

    Each mean is tried and rolled back. A mean that cannot be applied changes nothing and ends the search. Where there
    is nothing to measure accuracy with, the window ``unmeasured`` is used, if there is one.
    """
    before = probes.measure(step, always=True)
    tried: dict[int, float | None] = {}
    best, reason = unmeasured if before is None else None, "there is nothing to measure accuracy with"
    for window in choices if before is not None else ():
        try:
            applied = apply(window)
        except Exception as error:
            reason = failure("mean", error)
            break
        tried[window] = probes.measure(step, always=True)
        rollback(applied)
        reason = "no mean of the last checkpoints is better"
    better = {at: value for at, value in tried.items() if value is not None and before is not None and value > before}
    if better:
        best = max(better, key=lambda window: better[window])
    if best is not None:
        reason = f"the mean of the last {best} steps" + (", unmeasured: motions cancel" if before is None else "")
        try:
            apply(best)
        except Exception as error:
            best, reason = None, failure("mean", error)
    shown = {str(window): accuracy for window, accuracy in tried.items()}
    journal.append("average", step, accepted=best is not None, reason=reason, accuracy_before=before, tried=shown)

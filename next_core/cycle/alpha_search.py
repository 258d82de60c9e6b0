"""The choice of a jump's alpha by validation accuracy."""

import dataclasses
from collections.abc import Sequence

from next_core.backend import Backend
from next_core.cycle.jump import Jump, failure
from next_core.cycle.measurements import Stopwatch
from next_core.cycle.probes import Probes


def with_best_alpha(jump: Jump, alphas: Sequence[float], backend: Backend, probes: Probes, watch: Stopwatch) -> Jump:
    """Try the alphas in order, each undone, while accuracy strictly rises; return the jump with the last that did.

    Without a rise, or anything to measure it with, the jump is refused. Each accuracy is among the jump's diagnostics.
    """
    assert jump.prediction is not None
    best, chosen = probes.measure(jump.step, always=True), None
    if best is None:
        return jump.refused("alphas: there is nothing to measure accuracy with")
    figures = {**(jump.diagnostics or {}), "accuracy at alpha 0": best}
    for alpha in alphas:
        try:
            with watch:
                applied = backend.apply_jump(jump.prediction, alpha)
        except Exception as error:
            return jump.refused(failure("jump", error))
        accuracy = probes.measure(jump.step, always=True)
        with watch:
            backend.rollback(applied, jump.step)
        if accuracy is None:
            break
        figures[f"accuracy at alpha {alpha:g}"] = accuracy
        if accuracy <= best:
            break
        best, chosen = accuracy, alpha
    jump = dataclasses.replace(jump, alpha=chosen or jump.alpha, diagnostics=figures)
    return jump if chosen is not None else jump.refused(f"accuracy does not rise at alpha {alphas[0]:g}")

"""What half-precision checkpoints leave of the deltas between them."""

from __future__ import annotations

import math

from next_core.diagnostics.analysis_results import Precision
from next_core.diagnostics.trajectory import measured_steps
from next_core.history.history import History
from next_core.sources.precision import LOW, rounding_report


def read_precision(history: History) -> Precision | None:
    """The newest interval beside the rounding step; None where no full checkpoint is stored in low precision.

    The largest singular values are those of the local components, so that nothing is decomposed again.
    """
    source, steps = history.source, measured_steps(history)
    coarse = [name for name in history.names if source.precision(name) in LOW]
    if len(steps) < 2 or not coarse or not source.stores_full_weights:
        return None
    components = history.components("local", align=False)
    step, since = steps[-1], steps[-2]
    reports = [rounding_report(source, name, step, since, sigma=float(components[name].S[-1, 0])) for name in coarse]
    return Precision(
        step=step,
        since=since,
        delta_to_ulp={report.name: report.delta_to_ulp for report in reports if math.isfinite(report.delta_to_ulp)},
        drowned=tuple(report.name for report in reports if report.drowned),
    )

"""The plain run that a run with jumps is compared with: the same seed and steps, and no jump."""

import shutil
from pathlib import Path
from typing import Any

from next_core.backend import Backend
from next_core.cycle.journal import Journal
from next_core.cycle.measurements import CURVE, Measurements
from next_core.cycle.trainer_errors import closed_after_an_error, report_progress, start_trainer, trainer_errors
from next_core.plugins import make_chosen
from next_core.run_config import RunConfig
from next_core.types import Progress


def plain_run(config: RunConfig, out: Path, progress: Progress | None) -> dict[str, Any]:
    """Train in a folder of its own, from the start. Returns seconds, the accuracy at the end, the curve."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    backend: Backend = make_chosen("backend", config.backend)
    measure, every, steps = Measurements(backend, Journal(), out), config.measure_every, config.steps
    measured = [] if every is None else [*range(0, steps, every), steps]

    def step_ended(step: int) -> None:
        report_progress(progress, "plain RL", step, steps)
        if step in measured:
            measure(CURVE, step)

    with closed_after_an_error(backend), trainer_errors(out):
        backend.prepare(config.model_copy(update={"save_every": None}), out)
        start_trainer(backend, out, progress)
        if measured:
            step_ended(0)
        measure.start()
        # A trainer that is launched has to pause to be measured.
        for stop in [steps] if backend.in_process else measured[1:] or [steps]:
            backend.train(stop, step_ended)
        seconds = measure.training
        measure("final", steps)
    with trainer_errors(out):
        backend.close()
    return {"steps": steps, "seconds": seconds, "accuracy": measure.accuracy, "curve": measure.curve}

"""The plain run that a run with jumps is compared with: the same seed and steps, and no jump."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from next_core.backend import Backend
from next_core.cycle.measurements import Stopwatch, TrainingClock, accuracies
from next_core.cycle.trainer import closed_after_an_error, report_progress, start_trainer, trainer_errors
from next_core.plugins import make_chosen
from next_core.run_config import RunConfig
from next_core.types import Progress


def plain_run(config: RunConfig, out: Path, progress: Progress | None) -> dict[str, Any]:
    """Train in a folder of its own, from the start. Returns seconds, the accuracy at the end, the curve."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    backend: Backend = make_chosen("backend", config.backend)
    with closed_after_an_error(backend), trainer_errors(out):
        backend.prepare(config.model_copy(update={"save_every": None}), out)
        start_trainer(backend, out, progress)
        curve: list[dict[str, Any]] = []
        measuring = Stopwatch()
        clock = TrainingClock(measuring)

        def step_ended(step: int) -> None:
            report_progress(progress, "plain RL", step, config.steps)
            if config.measure_every is not None and (step % config.measure_every == 0 or step == config.steps):
                seconds = clock.seconds
                with measuring:
                    curve.append({"step": step, "seconds": seconds, **accuracies(backend)})

        if config.measure_every is not None:
            step_ended(0)
        clock.start()
        for stop in _stops(backend, config):
            backend.train(stop, step_ended)
        seconds = clock.since_start
        accuracy = backend.evaluate("test")
    with trainer_errors(out):
        backend.close()
    return {"steps": config.steps, "seconds": seconds, "accuracy": {"final": accuracy}, "curve": curve}


def _stops(backend: Backend, config: RunConfig) -> list[int]:
    """Return the steps at which a trainer that is launched has to pause to be measured."""
    if backend.in_process or config.measure_every is None:
        return [config.steps]
    return [*range(config.measure_every, config.steps, config.measure_every), config.steps]

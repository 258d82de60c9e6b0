"""Seconds and accuracies of a run."""

import time
from pathlib import Path
from typing import Any, Literal

from next_core.backend import Backend
from next_core.cycle.journal import Journal
from next_core.cycle.trainer_errors import trainer_errors

CURVE = "curve"  # Event of a journal record with accuracies along the run, and the milestone that asks for them
SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")


class Stopwatch:
    """Adds up the seconds spent inside ``with``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Measurements:
    """Measures a run at its milestones and journals the figures; measuring does not count as training."""

    def __init__(self, backend: Backend, journal: Journal, out: Path, resumed_from: int = 0) -> None:
        self._backend, self._journal, self._out = backend, journal, out
        self._watch = Stopwatch()
        earlier = [record for record in self._of(CURVE) if record["step"] <= resumed_from]
        self._before = earlier[-1]["seconds"] if earlier else 0.0
        self._start: float | None = None

    def start(self) -> None:
        """Start the clock: training begins."""
        self._start, self._measured = time.perf_counter(), self.measuring

    @property
    def training(self) -> float:
        """Seconds of training since ``start``."""
        if self._start is None:
            return 0.0
        return time.perf_counter() - self._start - (self.measuring - self._measured)

    @property
    def measuring(self) -> float:
        """Seconds spent on measuring."""
        return self._watch.seconds

    def __call__(self, milestone: str, step: int) -> None:
        """Measure both splits for the curve, or the test prompts for any other milestone."""
        seconds = self._before + self.training
        with self._watch, trainer_errors(self._out):
            if milestone == CURVE:
                found = {split: dict(self._backend.accuracies(split)) for split in SPLITS}
                self._journal.append(CURVE, step, seconds=seconds, **found)
                return
            value = self._backend.evaluate("test")
        self._journal.append("accuracy", step, milestone=milestone, value=value)

    @property
    def accuracy(self) -> dict[str, float | None]:
        """Accuracies on the test prompts by milestone, including those measured before a resume."""
        return {record["milestone"]: record["value"] for record in self._of("accuracy")}

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Training seconds (including those before a resume) and accuracies by step."""
        return [{key: record[key] for key in ("step", "seconds", *SPLITS)} for record in self._of(CURVE)]

    def _of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self._journal.counted() if record["event"] == event]

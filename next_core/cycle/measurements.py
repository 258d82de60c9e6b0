"""Seconds and accuracies of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from next_core.backend import Backend
from next_core.cycle.journal import Journal
from next_core.cycle.trainer import trainer_errors

CURVE = "curve"
"""Event of a journal record with accuracies along the run, and the milestone that asks for them."""
POINT = ("step", "seconds", "validation", "test")


class Stopwatch:
    """Adds up the seconds spent inside ``with``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class TrainingClock:
    """Seconds of training, including those before a resume, without those that ``measuring`` took."""

    def __init__(self, measuring: Stopwatch, before: float = 0.0) -> None:
        self._measuring, self._before = measuring, before
        self._start: float | None = None
        self._measured = 0.0

    def start(self) -> None:
        self._start, self._measured = time.perf_counter(), self._measuring.seconds

    @property
    def since_start(self) -> float:
        """Seconds since ``start``."""
        return self.seconds - self._before

    @property
    def seconds(self) -> float:
        if self._start is None:
            return self._before
        return self._before + time.perf_counter() - self._start - (self._measuring.seconds - self._measured)


class Measurements:
    """Measures a run at its milestones and journals the figures."""

    def __init__(self, backend: Backend, journal: Journal, out: Path, resumed_from: int) -> None:
        self._backend, self._journal, self._out = backend, journal, out
        self.watch = Stopwatch()
        earlier = [record for record in self._of(CURVE) if record["step"] <= resumed_from]
        self.clock = TrainingClock(self.watch, earlier[-1]["seconds"] if earlier else 0.0)

    def __call__(self, milestone: str, step: int) -> None:
        """Measure both splits for the curve, or the test prompts for any other milestone."""
        seconds = self.clock.seconds
        with self.watch, trainer_errors(self._out):
            if milestone == CURVE:
                self._journal.append(CURVE, step, seconds=seconds, **accuracies(self._backend))
                return
            value = self._backend.evaluate("test")
        self._journal.append("accuracy", step, milestone=milestone, value=value)

    @property
    def accuracy(self) -> dict[str, float | None]:
        """Accuracies on the test prompts by milestone, including those measured before a resume."""
        known: dict[str, float | None] = {"start": None, "before_jump": None, "after_jump": None, "final": None}
        return known | {record["milestone"]: record["value"] for record in self._of("accuracy")}

    @property
    def curve(self) -> list[dict[str, Any]]:
        return [{key: record[key] for key in POINT} for record in self._of(CURVE)]

    def _of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self._journal.counted() if record["event"] == event]


def accuracies(backend: Backend) -> Mapping[str, dict[str, float]]:
    """Return the accuracies on both splits, by kind."""
    return {split: dict(backend.accuracies(split)) for split in ("validation", "test")}

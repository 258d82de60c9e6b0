"""Seconds of training, without those of measuring."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds spent inside ``with``, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class TrainingClock:
    """Seconds of training, those before a resume included; what ``measuring`` takes does not count."""

    def __init__(self, measuring: Stopwatch, before: float = 0.0) -> None:
        self._measuring, self._before = measuring, before
        self._start: float | None = None
        self._measured = 0.0

    def start(self) -> None:
        self._start, self._measured = time.perf_counter(), self._measuring.seconds

    def stop(self) -> float:
        """Seconds since ``start``."""
        return self.seconds - self._before

    @property
    def seconds(self) -> float:
        if self._start is None:
            return self._before
        return self._before + time.perf_counter() - self._start - (self._measuring.seconds - self._measured)

"""Ctrl-C and SIGTERM: the first ends a run after its current step with its state saved, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Signals:
    """Handles both signals inside ``with``, in the main thread only, and restores the handlers at the end.

    ``received`` is the number of the last signal. Outside ``patient`` a signal raises ``KeyboardInterrupt`` at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in NAMES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Record the first signal instead of raising, for a loop that checks ``received`` after each step."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again or not self._patient:
            raise KeyboardInterrupt
        os.write(2, b"\nending after this step, with the state saved; once more to end at once\n")

    @property
    def name(self) -> str:
        """The name of the last signal, as a user knows it."""
        return "nothing" if self.received is None else NAMES[signal.Signals(self.received)]

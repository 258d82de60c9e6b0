"""What somebody else's code may do to a run: take a bounded time, and leave the random states as they were."""

from __future__ import annotations

import contextlib
import ctypes
import random
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import numpy as np
import torch


class TimeLimitReached(BaseException):  # an ``except Exception`` in the code that is ended must not catch it
    """The code within ``time_limit`` was ended."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise ``TimeLimitReached`` in the body after so many seconds, at its next step in Python.

    A single call into native code that never returns is not ended. In the main thread SIGALRM is used, which also ends
    a body that sleeps or waits.
    """
    if seconds is None:
        yield
    elif threading.current_thread() is threading.main_thread():
        with _alarm(seconds):
            yield
    else:
        thread = ctypes.c_ulong(threading.get_ident())
        raised = ctypes.py_object(TimeLimitReached)
        timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, (thread, raised))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ended(number: int, frame: FrameType | None) -> None:
        raise TimeLimitReached

    handler = signal.signal(signal.SIGALRM, ended)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def same_random_states() -> Iterator[None]:
    """Put the global random states of torch, NumPy and Python back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Limits on other people's code in a run: bounded time, and random states put back."""

import contextlib
import ctypes
import random
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import numpy as np
import torch


class TimeLimitReached(BaseException):  # so that an ``except Exception`` in the limited code does not catch it
    """The code inside ``time_limit`` took too long."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise ``TimeLimitReached`` in the body after so many seconds, at its next Python instruction.

    A call into native code that never returns is not interrupted. In the main thread SIGALRM is used, which also
    interrupts a body that sleeps or waits.
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
    """Restore the global random states of torch, NumPy and Python at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

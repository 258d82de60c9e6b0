"""A signal where no step is running ends the program at once; tests/crash sends them to a run that trains."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from next_core.cycle.signals import Signals


def test_where_nothing_can_wait_the_first_signal_ends_at_once() -> None:
    for waited in (False, True):
        with Signals() as signals:
            with signals.patient() if waited else contextlib.nullcontext():
                pass
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def handler_within() -> Any:
        with Signals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        assert pool.submit(handler_within).result() is signal.getsignal(signal.SIGTERM)

"""The first signal is noted where a run can wait for it; the second, or one elsewhere, ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from next_core.cycle.signals import Signals


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(
    number: signal.Signals, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    with Signals() as signals:
        with signals.patient():
            os.kill(os.getpid(), number)
            assert (signals.received, signals.name) == (number, name)
            assert "ending after this step, with the state saved" in capfd.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) is handler


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

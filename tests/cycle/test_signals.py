"""The first signal is noted where a run can wait for it; the second, or one elsewhere, ends it at once."""

from __future__ import annotations

import os
import signal

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
    with Signals() as signals:
        with signals.patient():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM

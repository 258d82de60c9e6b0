"""Code that hangs is ended, and what it did to the random states is put back."""

import random
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from next_core.process.containment import TimeLimitReached, same_random_states, time_limit


def spin() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:  # it must not catch its own end
            continue


def wait() -> None:
    time.sleep(60)


@pytest.mark.parametrize("hang", [spin, wait])
def test_what_hangs_is_ended(hang: Callable[[], None]) -> None:
    start = time.monotonic()
    with pytest.raises(TimeLimitReached), time_limit(0.2):
        hang()
    assert time.monotonic() - start < 30


def test_what_hangs_in_another_thread_is_ended() -> None:
    ended = []

    def work() -> None:
        with pytest.raises(TimeLimitReached), time_limit(0.2):
            spin()
        ended.append(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert ended


def test_what_ends_in_time_is_left_alone_and_an_alarm_of_others_still_rings() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with time_limit(60):
            pass
        with time_limit(None):
            pass
        time.sleep(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]


def test_random_states_are_as_before() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    def use() -> None:
        draw()
        torch.manual_seed(7)
        raise ValueError("x")

    seed()
    expected = draw()
    seed()
    with pytest.raises(ValueError, match="x"), same_random_states():
        use()
    assert draw() == expected

"""Processes of their own that begin warm: a server imports the trainer once, and forks a process when one is wanted."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # Seconds after which a process that should have ended is ended


@dataclass(frozen=True)
class Outcome:
    """How a process ended: minus the signal or the exit code, and what it returned, or raised as a text."""

    code: int
    value: Any = None
    error: str = ""

    @property
    def killed(self) -> bool:
        """Whether it was ended by SIGKILL, whoever sent it."""
        return self.code == -signal.SIGKILL


class Child:
    """One process that runs one function. It forks from one that has never trained, and has no thread of ours."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.crash.work"])
        receiving, sending = context.Pipe(duplex=False)
        self._receiving: Connection = receiving
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with mock.patch.dict(os.environ, {"PYTHONPATH": path}):  # the server, if it starts now, has to find the tests
            self._process = context.Process(target=_reporting, args=(sending, function, *arguments), daemon=True)
            self._process.start()
        sending.close()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float = PATIENCE) -> Outcome | None:
        """Its outcome; None while it is still running after so many seconds."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            return None
        value, error = None, ""
        with contextlib.suppress(EOFError):
            if self._receiving.poll():
                value, error = self._receiving.recv()
        return Outcome(self._process.exitcode, value, error)

    def ended(self) -> Outcome:
        """Its outcome, waited for."""
        outcome = self.wait()
        if outcome is None:
            self.kill()
            raise TimeoutError(f"a process did not end within {PATIENCE:g} s")
        return outcome

    def kill(self) -> Outcome:
        """End it by SIGKILL, unless it has ended."""
        self._process.kill()
        return self.ended()


def call(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Run a function in a process of its own, to its end."""
    return Child(function, *arguments).ended()


def _reporting(sending: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    if "trl" not in sys.modules:
        raise ImportError("the server could not import tests.crash.work")
    try:
        value = function(*arguments)
    except SystemExit:
        raise
    except BaseException as error:
        sending.send((None, f"{type(error).__name__}: {error}"))
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    sending.send((value, ""))

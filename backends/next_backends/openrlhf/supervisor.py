"""Starts the trainer, watches it, and leaves none of its processes behind. Run as a script by ``TrainerProcess``.

Standard input carries one line of JSON, the job, and stays open for as long as our side lives: its end, by whatever
cause, ends the trainer. So does a number, the grace period to use. Standard output is the trainer's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

TOKEN = "NEXT_CORE_TRAINER"
TICK = 0.1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 127


def family(token: str) -> list[psutil.Process]:
    """The living processes whose environment carries ``token``, and all who descend from them; never the caller.

    Descent matters because a process may write its title over its environment, as Ray's agents and vLLM do.
    """
    everyone: dict[int, psutil.Process] = {process.pid: process for process in psutil.process_iter()}
    members: set[int] = set()
    children: dict[int, list[int]] = {}
    for pid, process in everyone.items():
        with contextlib.suppress(psutil.Error, OSError):
            children.setdefault(process.ppid(), []).append(pid)
            if process.environ().get(TOKEN) == token:
                members.add(pid)
    unvisited = list(members)
    while unvisited:
        born = [child for child in children.get(unvisited.pop(), ()) if child not in members]
        members.update(born)
        unvisited += born
    return [everyone[pid] for pid in members if pid != os.getpid()]


def end_all(token: str, grace: float, reap: Callable[[], None] = lambda: None) -> None:
    """SIGTERM to every member of the family, SIGKILL after ``grace`` seconds, until two looks in a row find nobody."""
    told: set[psutil.Process] = set()
    deadline = time.monotonic() + grace
    empty = 0
    while empty < 2:
        reap()
        left = family(token)
        empty = 0 if left else empty + 1
        kill = time.monotonic() >= deadline
        for process in left:
            if kill or process not in told:
                told.add(process)
                with contextlib.suppress(psutil.Error, OSError):
                    process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        if left:
            time.sleep(TICK)


def adopt_orphans() -> None:
    """On Linux, whatever a descendant leaves behind becomes our child and not init's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap(command: subprocess.Popen[bytes]) -> None:
    """Collects every child that has ended, adopted ones too."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == command.pid:
                command.returncode = os.waitstatus_to_exitcode(ended[1])


def watch(command: subprocess.Popen[bytes], parent: int, signals: list[int], grace: float) -> float:
    """Waits for the command's end or ours; passes on the first signal, once. Returns the grace period to end with."""
    deadline = math.inf
    while True:
        reap(command)
        # A fork of our side may hold the pipe open after its death; the parent's pid tells.
        if command.returncode is not None or os.getppid() != parent or time.monotonic() >= deadline:
            return grace
        if signals and deadline == math.inf:
            command.send_signal(signals[0])
            deadline = time.monotonic() + grace
        if select.select([0], [], [], TICK)[0]:
            with contextlib.suppress(ValueError, OSError):
                return float(os.read(0, 64))
            return grace


def run(job: dict[str, Any], signals: list[int]) -> int:
    """Runs the job's command; returns its exit status, 128 + n for one killed by signal n."""
    token = os.environ[TOKEN]
    adopt_orphans()
    try:
        command = subprocess.Popen(
            job["command"], env=job["env"] | {TOKEN: token}, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(1, f"{job['command'][0]} did not start: {error}\n".encode())
        return NOT_STARTED
    grace = watch(command, job["parent"], signals, job["grace"])
    end_all(token, grace, lambda: reap(command))
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


def main() -> int:
    """Reads the job, runs it and removes its scratch directory."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        line = pipe.readline()
    if not line.endswith(b"\n"):  # our side was gone before it had said what to do
        return NOT_STARTED
    job: dict[str, Any] = json.loads(line)
    try:
        return run(job, signals)
    finally:
        if job["scratch"] is not None:
            shutil.rmtree(job["scratch"], ignore_errors=True)


if __name__ == "__main__":
    os._exit(main())  # an interpreter that tidies up first has no signal handlers any more

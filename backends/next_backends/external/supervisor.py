"""Start the trainer, watch it, and leave none of its processes behind: ``supervisor.py SCRATCH``.

``TrainerProcess`` runs this file as a script. Its standard input stays open while next-core lives: whatever comes,
its end included, ends the trainer. Standard output is the trainer's log.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

TOKEN = "NEXT_CORE_TRAINER"
JOB = "job.json"  # In the scratch folder: the command, its environment and more
TICK = 0.1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 127


def family(token: str) -> set[psutil.Process]:
    """Return the processes whose environment carries ``token``, and their descendants; never the caller.

    Descendants count because a process may overwrite its environment with a title, as Ray's agents and vLLM do.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process not in found and process.environ().get(TOKEN) == token:
                found |= {process, *process.children(recursive=True)}
    return found - {psutil.Process()}


def end_all(token: str, grace: float, reap: Callable[[], None] = lambda: None) -> None:
    """Send SIGTERM to the whole family, and SIGKILL after ``grace`` seconds, until nobody is left.

    A process may start another one while we look, so it takes two searches in a row that find nobody.
    """
    asked: set[psutil.Process] = set()
    deadline = time.monotonic() + grace
    empty = 0
    while empty < 2:
        reap()
        left = family(token)
        empty = 0 if left else empty + 1
        kill = time.monotonic() >= deadline
        for process in left if kill else left - asked:
            asked.add(process)
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        if left:
            time.sleep(TICK)


def reap(command: subprocess.Popen[bytes]) -> None:
    """Collect every child that has ended, adopted ones too."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == command.pid:
                command.returncode = os.waitstatus_to_exitcode(ended[1])


def watch(command: subprocess.Popen[bytes], parent: int, signals: list[int]) -> None:
    """Return when the command ends, next-core ends or asks for the end, or we get a signal."""
    while not signals and os.getppid() == parent:  # a fork of next-core may hold the pipe open after its death
        reap(command)
        if command.returncode is not None or select.select([0], [], [], TICK)[0]:
            return


def run(job: dict[str, Any], signals: list[int]) -> int:
    """Run the job's command; return its exit status, 128 + n if signal n killed it."""
    token = os.environ[TOKEN]
    if sys.platform == "linux":  # processes whose parent has ended become our children, and not init's
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        command = subprocess.Popen(
            job["command"], env=job["env"] | {TOKEN: token}, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(1, f"{job['command'][0]} did not start: {error}\n".encode())
        return NOT_STARTED
    watch(command, job["parent"], signals)
    end_all(token, job["grace"], lambda: reap(command))
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


def main(scratch: Path) -> int:
    """Run the job in the scratch folder and remove that folder."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        return run(json.loads((scratch / JOB).read_text(encoding="utf-8")), signals)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    os._exit(main(Path(sys.argv[1])))  # a regular exit restores the default signal handlers before it is done

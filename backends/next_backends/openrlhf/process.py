"""The trainer's process tree as one object: start it, ask how it is, say why it failed, end all of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from next_backends.openrlhf import supervisor
from next_backends.openrlhf.log import tail
from next_core.errors import BackendError

GRACE = 10.0
LINES, WIDTH, SEARCHED = 20, 300, 200
KILL_TIME = 30.0  # a process that writes out a large memory image or frees a GPU may take long to die
_PREFIX = re.compile(r"^\([^()]* pid=\d+[^()]*\) ?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b")


class TrainerProcess:
    """A command and all processes that come of it, none of which outlives this process; a context manager.

    A supervisor process holds them: it learns of our end, SIGKILL included, and ends them. See ``start``.
    """

    def __init__(self, held: subprocess.Popen[bytes], token: str, log: Path, scratch: Path | None, grace: float):
        self._supervisor, self.token, self.log = held, token, log
        self._scratch, self._grace = scratch, grace

    @classmethod
    def start(
        cls, command: Sequence[str], env: Mapping[str, str], log: Path, scratch: Path | None, grace: float = GRACE
    ) -> Self:
        """Starts ``command`` with ``env`` as its whole environment; its output is appended to ``log``.

        ``scratch`` is removed when all is over. ``grace``: the seconds from SIGTERM to SIGKILL. Raises
        ``BackendError`` when the log cannot be written. A command that cannot be run ends with status 127.
        """
        token = secrets.token_hex(16)
        job = {
            "command": list(command),
            "env": {"SPT_NOENV": "1"} | dict(env),  # setproctitle then leaves the environment, and the token, alone
            "scratch": None if scratch is None else str(scratch.absolute()),
            "grace": grace,
            "parent": os.getpid(),
        }
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                held = subprocess.Popen(
                    [sys.executable, "-P", supervisor.__file__],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=os.environ | {supervisor.TOKEN: token},
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            raise BackendError(f"the trainer's log {log} cannot be written ({error}); choose another folder") from error
        process = cls(held, token, log, scratch, grace)
        process._send(json.dumps(job).encode() + b"\n")
        return process

    def _send(self, message: bytes) -> None:
        """Write ``message`` to the supervisor; one that has ended reads nothing, and ``poll`` shows that."""
        pipe = self._supervisor.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            while message:
                message = message[pipe.write(message) or 0 :]

    @property
    def pid(self) -> int:
        """The supervisor's process id; SIGINT and SIGTERM sent to it reach the command, once."""
        return self._supervisor.pid

    def poll(self) -> int | None:
        """The command's exit status, 128 + n when signal n killed it; None until nothing of it is left."""
        status = self._supervisor.poll()
        return status if status is None or status >= 0 else 128 - status

    @property
    def running(self) -> bool:
        """Whether anything of the trainer is left."""
        return self.poll() is None

    def check(self, ended: str | None = None) -> None:
        """Raises ``BackendError`` with the log's last lines when the trainer has failed.

        With ``ended`` (such as "before step 12"), a trainer that has ended well has failed too.
        """
        status = self.poll()
        if status is None or (status == 0 and ended is None):
            return
        how = f"with status {status}"
        if status > 128:
            with contextlib.suppress(ValueError):
                how += f" ({signal.Signals(status - 128).name}{', often for want of memory' if status == 137 else ''})"
        lines = excerpt(self.log)
        said = "\n".join(["its last lines:", *lines]) if lines else "it wrote nothing"
        raise BackendError(f"the trainer ended {f'{ended}, ' if ended else ''}{how}; whole log: {self.log}; {said}")

    def stop(self, grace: float | None = None) -> None:
        """Ends everything and waits until nothing is left; again and again does no harm.

        ``grace`` replaces the one given to ``start`` unless the end has begun already. Raises ``BackendError`` that
        names the processes that would not die.
        """
        pipe = self._supervisor.stdin
        if pipe is not None and not pipe.closed:
            self._send(str(self._grace if grace is None else grace).encode())  # a fork of ours may hold the pipe open
            pipe.close()
        try:
            self._supervisor.wait(max(self._grace, grace or 0.0) + KILL_TIME)
        except subprocess.TimeoutExpired:
            pids = ", ".join(map(str, leftovers(self.token)))
            raise BackendError(f"the trainer's processes {pids} do not end; end them by hand") from None
        if self._supervisor.returncode < 0:  # the supervisor itself was killed
            supervisor.end_all(self.token, self._grace if grace is None else grace)
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def leftovers(token: str) -> list[int]:
    """The pids of all that is still alive of the trainer with this token, its supervisor included."""
    return sorted(process.pid for process in supervisor.family(token))


def excerpt(log: Path) -> list[str]:
    """At most 20 lines of the log, each at most 300 characters: the last traceback and what follows, or the end."""
    lines = tail(log, SEARCHED)
    bare = [_PREFIX.sub("", line) for line in lines]
    start = next((at for at in reversed(range(len(bare))) if bare[at].startswith("Traceback (most")), None)
    if start is None:
        chosen = lines[-LINES:]
    else:
        last = next((at for at in reversed(range(start, len(bare))) if _EXCEPTION.match(bare[at])), len(bare) - 1)
        chosen = lines[start : max(last + 1, start + LINES)]
        if len(chosen) > LINES:
            chosen = [chosen[0], "...", *chosen[-LINES + 2 :]]
    return [line[:WIDTH] for line in chosen]

"""The trainer's process tree as one object: start it, ask how it is, report why it failed, end all of it."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from next_backends.external import supervisor
from next_backends.external.log import excerpt
from next_core.errors import BackendError, trainer_lost

GRACE = 10.0  # Seconds from SIGTERM to SIGKILL
KILL_TIME = 30.0
"""Seconds to wait for processes that got SIGKILL: freeing a GPU or writing out a memory image takes long."""


class TrainerProcess:
    """A command and all its descendants, none of which outlives next-core.

    A supervisor process owns them. It notices when next-core ends, even by SIGKILL, and ends them.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, scratch: Path, grace: float = GRACE
    ) -> None:
        """Start ``command`` with ``env`` as its whole environment and append its output to ``log``.

        ``scratch``, a folder closed to other users, is removed once everything has ended. A command that cannot be run
        ends with status 127. Raises ``BackendError`` when the log cannot be written.
        """
        self.token, self.log = secrets.token_hex(16), log
        self._scratch, self._grace = scratch, grace
        job = {
            "command": list(command),
            "env": {"SPT_NOENV": "1"} | dict(env),  # setproctitle then leaves the environment, and the token, alone
            "grace": grace,
            "parent": os.getpid(),
        }
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            (scratch / supervisor.JOB).write_text(json.dumps(job), encoding="utf-8")
            with log.open("ab") as output:
                self._supervisor = subprocess.Popen(
                    [sys.executable, "-P", supervisor.__file__, str(scratch.absolute())],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=os.environ | {supervisor.TOKEN: self.token},
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            raise BackendError(
                f"the trainer's log {log} cannot be written ({error}); choose another folder",
                kind="storage-not-writable",
            ) from error

    def poll(self) -> int | None:
        """Return the command's exit status, 128 + n if signal n killed it; None until none of its processes is left."""
        status = self._supervisor.poll()
        return status if status is None or status >= 0 else 128 - status

    @property
    def running(self) -> bool:
        """Whether any process of the trainer is left."""
        return self.poll() is None

    def check(self, ended: str | None = None) -> None:
        """Raise ``BackendError`` with the log's last lines if the trainer has failed.

        With ``ended`` (such as "before step 12") a trainer that ended with status 0 has failed too.
        """
        status = self.poll()
        if status is None or (status == 0 and ended is None):
            return
        how = f"with status {status}"
        if status > 128:
            with contextlib.suppress(ValueError):
                how += f" ({signal.Signals(status - 128).name}{', often out of memory' if status == 137 else ''})"
        lines = excerpt(self.log)
        last = "\n".join(["its last lines:", *lines]) if lines else "it wrote nothing"
        raise trainer_lost(f"the trainer ended {f'{ended}, ' if ended else ''}{how}; full log: {self.log}; {last}")

    def stop(self) -> None:
        """End all processes and wait until none is left; does nothing when repeated.

        Raises ``BackendError`` with the pids of those that do not end.
        """
        pipe = self._supervisor.stdin
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):  # it has ended
                pipe.write(b"stop")  # a fork of ours may hold the pipe open
            pipe.close()
        try:
            self._supervisor.wait(self._grace + KILL_TIME)
        except subprocess.TimeoutExpired:
            pids = ", ".join(map(str, leftovers(self.token)))
            raise trainer_lost(f"the trainer's processes {pids} do not end; end them by hand") from None
        if self._supervisor.returncode < 0:  # the supervisor itself was killed
            supervisor.end_all(self.token, self._grace)
            shutil.rmtree(self._scratch, ignore_errors=True)


def leftovers(token: str) -> list[int]:
    """Return the pids of all living processes of the trainer with this token, its supervisor included."""
    return sorted(process.pid for process in supervisor.family(token))

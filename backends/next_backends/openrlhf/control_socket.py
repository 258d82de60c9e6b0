"""Our end of the connection to a trainer under control: JSON objects, framed by multiprocessing, over a Unix socket."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from next_core.errors import BackendError

LONGEST = 2**20
"""Bytes of one message of the trainer: answers are figures, never weights."""
KEY_TIMEOUT = 5.0


class ControlSocket:
    """Accepts the trainer, which sends ``key`` first, and hangs up on anybody else.

    Only processes of the same user reach the socket, because ``folder`` is closed to others. Messages are JSON and
    never unpickled.
    """

    def __init__(self, folder: Path) -> None:
        self.address, self.key = str(folder / "control"), secrets.token_hex(16)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._listener.setblocking(False)
        self._trainer: Connection | None = None

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, or None if there is none yet. Raises ``BackendError`` if the trainer has hung up."""
        if self._trainer is None:
            self._accept()
        try:
            if self._trainer is None or not self._trainer.poll():
                return None
            message: dict[str, Any] = json.loads(self._trainer.recv_bytes(LONGEST))
        except (EOFError, OSError) as error:
            raise _hung_up(error) from None
        return message

    def send(self, message: dict[str, Any]) -> None:
        """Send to the trainer, which has connected. Raises ``BackendError`` if it has hung up."""
        assert self._trainer is not None
        try:
            self._trainer.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise _hung_up(error) from None

    def close(self) -> None:
        """Hang up and accept no more calls."""
        self._listener.close()
        if self._trainer is not None:
            self._trainer.close()

    def _accept(self) -> None:
        try:
            caller = Connection(self._listener.accept()[0].detach())
        except BlockingIOError:
            return
        try:
            if caller.poll(KEY_TIMEOUT) and hmac.compare_digest(caller.recv_bytes(256), self.key.encode()):
                self._trainer = caller
                return
        except (EOFError, OSError):
            pass
        caller.close()


def _hung_up(error: EOFError | OSError) -> BackendError:
    return BackendError(f"the trainer has hung up ({error or 'end of file'})", kind="backend-process-lost")

"""Our end of the connection to a trainer: JSON objects, framed by multiprocessing, over a Unix socket."""

from __future__ import annotations

import json
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from next_core.errors import BackendError

LONGEST = 2**20
"""Bytes of one message of the trainer: answers are figures, never weights."""


class ControlSocket:
    """Accepts one caller, the trainer.

    Only processes of the same user can call, because ``folder`` is closed to others. Messages are JSON and never
    unpickled.
    """

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "control")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._listener.setblocking(False)
        self._trainer: Connection | None = None

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, or None if there is none yet. Raises ``BackendError`` if the trainer has hung up."""
        try:
            if self._trainer is None:
                self._trainer = Connection(self._listener.accept()[0].detach())
            if not self._trainer.poll():
                return None
            message: dict[str, Any] = json.loads(self._trainer.recv_bytes(LONGEST))
        except BlockingIOError:
            return None
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


def _hung_up(error: EOFError | OSError) -> BackendError:
    return BackendError(f"the trainer has hung up ({error or 'end of file'})", kind="backend-process-lost")

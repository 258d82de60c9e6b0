"""Our end of the connection to a trainer that pauses and obeys: JSON objects, a line each, over a local socket."""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
from typing import Any

from next_core.errors import BackendError

LONGEST = 2**20
"""Bytes of one message of the trainer: answers are figures, never weights."""


class ControlSocket:
    """Listens until a caller says the right key first: that is the trainer. Any other is turned away, or waits."""

    def __init__(self) -> None:
        self.key = secrets.token_hex(16)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._callers: dict[socket.socket, bytes] = {}
        self._trainer: socket.socket | None = None
        self._read = b""

    @property
    def address(self) -> tuple[str, int]:
        """Where the trainer calls."""
        host, port = self._listening.getsockname()
        return host, port

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when there is none yet. Raises ``BackendError`` when the trainer has hung up."""
        if self._trainer is None:
            self._meet()
        if self._trainer is None:
            return None
        while b"\n" not in self._read and _ready(self._trainer):
            part = _part(self._trainer)
            if not part:
                raise BackendError("the trainer has hung up")
            self._read += part
            if len(self._read) > LONGEST:
                raise BackendError(f"the trainer sent a message of more than {LONGEST} bytes")
        line, end, rest = self._read.partition(b"\n")
        if not end:
            return None
        self._read = rest
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, message: dict[str, Any]) -> None:
        """Raises ``BackendError`` when the trainer has hung up."""
        if self._trainer is None:
            raise BackendError("the trainer has not called yet")
        try:
            self._trainer.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise BackendError(f"the trainer has hung up ({error.strerror})") from None

    def close(self) -> None:
        """Hang up, and take no more calls."""
        for end in (self._trainer, *self._callers, self._listening):
            if end is not None:
                end.close()
        self._callers.clear()

    def _meet(self) -> None:
        """Take calls, and hear what callers say first."""
        while _ready(self._listening):
            caller, _ = self._listening.accept()
            self._callers[caller] = b""
        for caller in [caller for caller in self._callers if _ready(caller)]:
            part = _part(caller)
            said = self._callers[caller] = self._callers[caller] + part
            line, end, rest = said.partition(b"\n")
            if end and self._is_key(line):
                del self._callers[caller]
                self._trainer, self._read = caller, rest
                return
            if end or not part or len(said) > LONGEST:
                del self._callers[caller]
                caller.close()

    def _is_key(self, line: bytes) -> bool:
        try:
            said = json.loads(line)
        except ValueError:
            return False
        return isinstance(said, dict) and hmac.compare_digest(str(said.get("key")).encode(), self.key.encode())


def _ready(end: socket.socket) -> bool:
    return bool(select.select([end], [], [], 0)[0])


def _part(end: socket.socket) -> bytes:
    """What has come; nothing when the other side has hung up."""
    try:
        return end.recv(2**16)
    except OSError:
        return b""

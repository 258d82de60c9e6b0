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
"""Bytes of one message: answers are figures, never weights."""


class Channel:
    """Listens until the trainer calls with the right key; later callers are turned away."""

    def __init__(self) -> None:
        self.key = secrets.token_hex(16)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._peer: socket.socket | None = None
        self._read = b""

    @property
    def address(self) -> tuple[str, int]:
        """Where the trainer calls."""
        host, port = self._listening.getsockname()
        return host, port

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when there is none yet. Raises ``BackendError`` when the trainer has hung up."""
        if self._peer is None:
            if not select.select([self._listening], [], [], 0)[0]:
                return None
            self._peer, _ = self._listening.accept()
        while b"\n" not in self._read:
            if not select.select([self._peer], [], [], 0)[0]:
                return None
            part = self._received(self._peer)
            self._read += part
            if len(self._read) > LONGEST:
                raise BackendError("the trainer's hook sent more than a message; is another program on its port?")
        line, _, self._read = self._read.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "key" in message:  # its first words
            if not hmac.compare_digest(str(message["key"]), self.key):
                self._peer.close()
                self._peer, self._read = None, b""
            return self.receive()
        return message

    def send(self, message: dict[str, Any]) -> None:
        """Raises ``BackendError`` when the trainer has hung up."""
        if self._peer is None:
            raise BackendError("the trainer has not called yet")
        try:
            self._peer.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise BackendError(f"the trainer has hung up ({error.strerror})") from None

    def close(self) -> None:
        for end in (self._peer, self._listening):
            if end is not None:
                end.close()

    @staticmethod
    def _received(peer: socket.socket) -> bytes:
        try:
            part = peer.recv(2**16)
        except OSError:
            part = b""
        if not part:
            raise BackendError("the trainer has hung up")
        return part

"""Our end of the connection to a trainer: it hears the caller with the key, and nobody else."""

from __future__ import annotations

import json
import stat
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from next_backends.openrlhf import control_socket
from next_backends.openrlhf.control_socket import LONGEST, ControlSocket
from tests.errors import raises_kind


class Ends:
    """Our socket, and callers who hang up when the test is over."""

    def __init__(self, folder: Path) -> None:
        self.socket = ControlSocket(folder)
        self.callers: list[Connection] = []

    def call(self, *messages: bytes) -> Connection:
        self.callers.append(Client(self.socket.address, "AF_UNIX"))
        for message in messages:
            self.callers[-1].send_bytes(message)
        return self.callers[-1]

    def trainer(self, *messages: dict[str, Any]) -> Connection:
        return self.call(self.socket.key.encode(), *(json.dumps(message).encode() for message in messages))

    def heard(self, seconds: float = 10.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (message := self.socket.receive()) is None:
            assert time.monotonic() < end, "nothing was heard"
            time.sleep(0.005)
        return message


@pytest.fixture
def ends() -> Iterator[Ends]:
    with tempfile.TemporaryDirectory() as folder:
        made = Ends(Path(folder))
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700  # as the trainer's: nobody else reaches the socket
        yield made
        for end in (*made.callers, made.socket):
            end.close()


def test_messages_go_both_ways_in_order(ends: Ends) -> None:
    assert ends.socket.receive() is None
    caller = ends.trainer({"paused": 3}, {"value": "ä" * 10_000})
    assert ends.heard() == {"paused": 3}
    assert ends.heard() == {"value": "ä" * 10_000}
    assert ends.socket.receive() is None
    ends.socket.send({"do": "train", "until": 4})
    assert json.loads(caller.recv_bytes()) == {"do": "train", "until": 4}


@pytest.mark.parametrize("message", [b"0123", b'{"paused": 9}', b"\x80\x04N.", b"x" * 1000, None])
def test_callers_without_the_key_are_not_heard(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, message: bytes | None
) -> None:
    monkeypatch.setattr(control_socket, "KEY_TIMEOUT", 0.1)
    stranger = ends.call() if message is None else ends.call(message, b'{"paused": 9}')
    assert ends.socket.receive() is None
    with pytest.raises((EOFError, OSError)):
        stranger.recv_bytes()
    ends.trainer({"paused": 1})
    assert ends.heard() == {"paused": 1}


def test_a_caller_who_hangs_up_does_not_count(ends: Ends) -> None:
    ends.call().close()
    ends.trainer({"paused": 1})
    assert ends.heard() == {"paused": 1}


def test_a_second_caller_is_not_heard(ends: Ends) -> None:
    first = ends.trainer({"paused": 1})
    assert ends.heard() == {"paused": 1}
    ends.trainer({"paused": 9})
    assert ends.socket.receive() is None
    first.send_bytes(b'{"value": 2}')
    assert ends.heard() == {"value": 2}


def test_a_trainer_that_hangs_up_is_an_error_after_its_last_message(ends: Ends) -> None:
    ends.trainer({"paused": 1}).close()
    assert ends.heard() == {"paused": 1}
    with raises_kind("backend-process-lost"):
        ends.heard()
    with raises_kind("backend-process-lost"):
        ends.socket.send({"do": "save"})


def test_a_message_that_is_too_long_is_not_read(ends: Ends) -> None:
    caller = ends.trainer({"paused": 1})
    assert ends.heard() == {"paused": 1}
    caller._send((LONGEST + 1).to_bytes(4, "big"))  # type: ignore[attr-defined] - the announced length alone
    with raises_kind("backend-process-lost"):
        ends.heard()

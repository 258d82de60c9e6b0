"""Our end of the connection to a trainer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from next_backends.openrlhf.control_socket import LONGEST, ControlSocket
from tests.errors import raises_kind


class Ends:
    """Our socket, and callers who hang up when the test is over."""

    def __init__(self, folder: Path) -> None:
        self.socket = ControlSocket(folder)
        self.callers: list[Connection] = []

    def call(self, *messages: dict[str, Any]) -> Connection:
        self.callers.append(Client(self.socket.address, "AF_UNIX"))
        for message in messages:
            self.callers[-1].send_bytes(json.dumps(message).encode())
        return self.callers[-1]

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
        yield made
        for end in (*made.callers, made.socket):
            end.close()


def test_messages_go_both_ways_in_order(ends: Ends) -> None:
    assert ends.socket.receive() is None
    caller = ends.call({"paused": 3}, {"value": "ä" * 10_000})
    assert ends.heard() == {"paused": 3}
    assert ends.heard() == {"value": "ä" * 10_000}
    assert ends.socket.receive() is None
    ends.socket.send({"do": "train", "until": 4})
    assert json.loads(caller.recv_bytes()) == {"do": "train", "until": 4}


def test_a_second_caller_is_not_heard(ends: Ends) -> None:
    first = ends.call({"paused": 1})
    assert ends.heard() == {"paused": 1}
    ends.call({"paused": 9})
    assert ends.socket.receive() is None
    first.send_bytes(b'{"value": 2}')
    assert ends.heard() == {"value": 2}


def test_a_trainer_that_hangs_up_is_an_error_after_its_last_message(ends: Ends) -> None:
    ends.call({"paused": 1}).close()
    assert ends.heard() == {"paused": 1}
    with raises_kind("backend-process-lost"):
        ends.heard()
    with raises_kind("backend-process-lost"):
        ends.socket.send({"do": "save"})


def test_a_message_that_is_too_long_is_not_read(ends: Ends) -> None:
    caller = ends.call({"paused": 1})
    assert ends.heard() == {"paused": 1}
    caller._send((LONGEST + 1).to_bytes(4, "big"))  # type: ignore[attr-defined] - the announced length alone
    with raises_kind("backend-process-lost"):
        ends.heard()

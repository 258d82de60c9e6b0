"""Our end of the connection to a trainer: whoever calls with the key is heard, and a line at a time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from next_backends.openrlhf.control_socket import LONGEST, ControlSocket
from next_core.errors import BackendError


@pytest.fixture
def channel() -> Iterator[ControlSocket]:
    made = ControlSocket()
    yield made
    made.close()


@pytest.fixture
def callers() -> Iterator[list[socket.socket]]:
    """They hang up when the test is over."""
    made: list[socket.socket] = []
    yield made
    for caller in made:
        caller.close()


def call(channel: ControlSocket, callers: list[socket.socket], *lines: bytes) -> socket.socket:
    callers.append(socket.create_connection(channel.address, timeout=5))
    callers[-1].sendall(b"".join(lines))
    return callers[-1]


def key(channel: ControlSocket) -> bytes:
    return json.dumps({"key": channel.key}).encode() + b"\n"


def heard(channel: ControlSocket, seconds: float = 5.0) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (message := channel.receive()) is None:
        assert time.monotonic() < end, "nothing was heard"
        time.sleep(0.005)
    return message


def hung_up(caller: socket.socket) -> bool:
    try:
        return caller.recv(1) == b""
    except ConnectionResetError:
        return True


def test_nothing_is_heard_before_somebody_calls(channel: ControlSocket) -> None:
    assert channel.receive() is None
    with pytest.raises(BackendError, match="has not called yet"):
        channel.send({"do": "stop"})


def test_messages_go_both_ways_in_order(channel: ControlSocket, callers: list[socket.socket]) -> None:
    caller = call(channel, callers, key(channel), b'{"paused": 3}\n{"value": 0.5}\n')
    assert heard(channel) == {"paused": 3}
    assert heard(channel) == {"value": 0.5}
    assert channel.receive() is None
    channel.send({"do": "train", "until": 4})
    assert json.loads(caller.makefile("r").readline()) == {"do": "train", "until": 4}


def test_a_line_may_come_in_parts(channel: ControlSocket, callers: list[socket.socket]) -> None:
    whole = key(channel) + b'{"value": "\xc3\xa4"}\n'
    caller = call(channel, callers)
    for at in range(len(whole) - 1):
        caller.sendall(whole[at : at + 1])
        assert channel.receive() is None
    caller.sendall(b"\n")
    assert heard(channel) == {"value": "ä"}


def test_a_wrong_key_is_turned_away_and_the_right_one_heard(
    channel: ControlSocket, callers: list[socket.socket]
) -> None:
    stranger = call(channel, callers, b'{"key": "0123"}\n{"paused": 9}\n')
    assert channel.receive() is None
    assert hung_up(stranger)
    call(channel, callers, key(channel), b'{"paused": 1}\n')
    assert heard(channel) == {"paused": 1}


def test_two_callers_do_not_mix(channel: ControlSocket, callers: list[socket.socket]) -> None:
    first = call(channel, callers, key(channel), b'{"paused": 1}\n')
    assert heard(channel) == {"paused": 1}
    call(channel, callers, b'{"key": "0123"}\n{"paused": 9}\n')
    assert channel.receive() is None
    first.sendall(b'{"value": 2}\n')
    assert heard(channel) == {"value": 2}


def test_a_trainer_that_hangs_up_is_an_error_once_its_last_words_are_heard(
    channel: ControlSocket, callers: list[socket.socket]
) -> None:
    caller = call(channel, callers, key(channel), b'{"paused": 1}\n{"val')
    caller.close()
    assert heard(channel) == {"paused": 1}
    with pytest.raises(BackendError, match="the trainer has hung up"):
        heard(channel)


def test_sending_to_a_trainer_that_has_hung_up_is_an_error(
    channel: ControlSocket, callers: list[socket.socket]
) -> None:
    caller = call(channel, callers, key(channel), b'{"paused": 1}\n')
    heard(channel)
    caller.close()
    with pytest.raises(BackendError, match=r"the trainer has hung up \(Broken pipe|Connection reset"):
        for _ in range(100):
            channel.send({"do": "save"})
            time.sleep(0.01)


def test_what_is_no_message_of_ours_is_not_kept_without_end(
    channel: ControlSocket, callers: list[socket.socket]
) -> None:
    caller = call(channel, callers, key(channel))
    caller.settimeout(0.01)
    with pytest.raises(BackendError, match="a message of more than 1048576 bytes"):
        for _ in range(2 * LONGEST // 2**15):
            caller.sendall(b"x" * 2**15)
            channel.receive()


def test_a_message_before_the_key_is_not_heard(channel: ControlSocket, callers: list[socket.socket]) -> None:
    call(channel, callers, b'{"paused": 9}\n')
    call(channel, callers, key(channel), b'{"paused": 1}\n')
    assert heard(channel) == {"paused": 1}


def test_a_caller_who_hangs_up_before_the_key_does_not_count(
    channel: ControlSocket, callers: list[socket.socket]
) -> None:
    call(channel, callers).close()
    call(channel, callers, key(channel), b'{"paused": 1}\n')
    assert heard(channel) == {"paused": 1}


def test_a_caller_who_is_silent_does_not_keep_others_out(channel: ControlSocket, callers: list[socket.socket]) -> None:
    call(channel, callers)
    assert channel.receive() is None
    call(channel, callers, key(channel), b'{"paused": 1}\n')
    assert heard(channel, 1.0) == {"paused": 1}


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"[1]\n", b"5\n", b"\xff\n"])
def test_a_stranger_s_words_are_turned_away(channel: ControlSocket, callers: list[socket.socket], line: bytes) -> None:
    call(channel, callers, line)
    call(channel, callers, key(channel), b'{"paused": 1}\n')
    assert heard(channel) == {"paused": 1}

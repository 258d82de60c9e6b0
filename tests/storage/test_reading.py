"""Small files are read within bounds, whatever lies in their place."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from next_core.storage.reading import parse_checked, parse_json, read_bytes, read_text, with_checksum


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="it is too large: more than 4 bytes"):
        read_bytes(path, 4)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        read_text(path)


def test_a_file_larger_than_memory_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(ValueError, match="too large"):
        read_bytes(tmp_path / "x")


def test_a_file_that_says_it_is_empty_and_is_not_is_bounded_as_well() -> None:
    assert len(read_bytes(Path("/proc/self/status"))) > 0
    with pytest.raises(ValueError, match="too large"):
        read_bytes(Path("/proc/self/status"), 10)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        server.bind("socket")
        for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(ValueError, match="it is no regular file"):
                read_bytes(path)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(ValueError, match="null"):
        read_bytes(tmp_path / "a\0b")
    with pytest.raises(OSError, match="too long"):
        read_bytes(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "NaN is no JSON"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON"),
        ("1e999", "1e999 is no double"),
        ("18446744073709551616", "does not fit in 64 bits"),
        ("-" + "1" * 10_000, "does not fit in 64 bits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("{", "Expecting"),
        ('"\0"', "Invalid control character"),
        (b"\xff", "decode"),
    ],
)
def test_what_is_no_json_is_a_value_error(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_json(text)


def test_numbers_that_fit_are_read_and_pythons_own_where_they_are_asked_for() -> None:
    assert parse_json("[18446744073709551615, -9223372036854775808, 1e308]") == [2**64 - 1, -(2**63), 1e308]
    nan, infinity = parse_json("[NaN, Infinity]", finite=False)
    assert math.isnan(nan)
    assert infinity == math.inf


def test_a_large_file_of_brackets_takes_seconds_at_most() -> None:
    start = time.process_time()
    assert len(parse_json("[" + "[]," * 2_000_000 + "[]]")) == 2_000_001
    assert time.process_time() - start < 5


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, min_size=1), st.data())
def test_every_byte_of_a_checked_object_counts(value: dict[str, object], data: st.DataObject) -> None:
    sealed = with_checksum(json.dumps(value))
    assert parse_checked(sealed) == json.loads(json.dumps(value))
    damaged = bytearray(sealed)
    damaged[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="checksum"):
        parse_checked(bytes(damaged))
    with pytest.raises(ValueError, match="checksum"):
        parse_checked(sealed[: data.draw(st.integers(0, len(sealed) - 1))])

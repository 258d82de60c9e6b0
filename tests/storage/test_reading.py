"""Small files are read within limits, whatever lies in their place."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from next_core.storage.reading import parse_checked, parse_json, read_bytes, read_text, with_checksum


def test_a_file_is_read_up_to_its_limit_and_must_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match="limit of 4 bytes"):
        read_bytes(path, 4)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        read_text(path)


def test_a_file_whose_reported_size_is_0_is_bounded_too() -> None:
    assert len(read_bytes(Path("/proc/self/status"))) > 0
    with pytest.raises(ValueError, match="limit"):
        read_bytes(Path("/proc/self/status"), 10)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match="regular file"):
            read_bytes(path)
    with pytest.raises(ValueError, match="null"):
        read_bytes(tmp_path / "a\0b")
    with pytest.raises(OSError, match="too long"):
        read_bytes(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        '{"a": [-Infinity]}',
        "1e999",
        "18446744073709551616",
        "-" + "1" * 10_000,
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "{",
        '"\0"',
        b"\xff",
    ],
)
def test_invalid_or_unbounded_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_numbers_that_fit_are_read_and_nan_only_on_request() -> None:
    assert parse_json("[18446744073709551615, -9223372036854775808, 1e308]") == [2**64 - 1, -(2**63), 1e308]
    nan, infinity = parse_json("[NaN, Infinity]", finite=False)
    assert math.isnan(nan)
    assert infinity == math.inf


values = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), values | st.text() | st.lists(values), min_size=1), st.data())
def test_every_byte_of_an_object_with_a_checksum_counts(value: dict[str, object], data: st.DataObject) -> None:
    sealed = with_checksum(json.dumps(value))
    assert parse_checked(sealed) == json.loads(json.dumps(value))
    damaged = bytearray(sealed)
    damaged[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    for broken in (bytes(damaged), sealed[: data.draw(st.integers(0, len(sealed) - 1))]):
        with pytest.raises(ValueError, match="checksum"):
            parse_checked(broken)

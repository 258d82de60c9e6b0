"""Lines of JSON that carry their checksum."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from next_core.storage.json_lines import append_json_line, json_line, json_text, parse_json_line


def test_a_line_is_read_back_and_is_json_for_anybody() -> None:
    line = json_line({"step": 5, "text": "two\nlines", "ratio": math.inf})
    assert line.count(b"\n") == 1
    record = {"step": 5, "text": "two\nlines", "ratio": None}
    assert parse_json_line(line) == record
    assert parse_json_line(line.removesuffix(b"\n")) == record
    assert json.loads(line) == record | {"crc32": line[-11:-3].decode()}


def test_a_flipped_bit_anywhere_in_a_line_is_seen() -> None:
    line = json_line({"event": "jump", "step": 50, "accepted": True, "norm_ratio": 2.5})
    for at in range(len(line) - 1):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[at] ^= 1 << bit
            with pytest.raises(ValueError, match="checksum"):
                parse_json_line(bytes(damaged))


def test_a_record_of_other_values_with_the_old_checksum_is_refused() -> None:
    line = json_line({"step": 50})
    with pytest.raises(ValueError, match="its checksum does not match"):
        parse_json_line(line.replace(b"50", b"60"))
    with pytest.raises(ValueError, match="it has no checksum"):
        parse_json_line(b'{"step": 50}\n')


def test_numbers_that_json_does_not_have_become_null() -> None:
    assert json_text({"a": [math.nan, (1.5, -math.inf)]}) == '{"a": [null, [1.5, null]]}'


def test_a_torn_last_line_is_cut_off_before_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "cr')
    append_json_line(path, {"step": 3})
    assert [parse_json_line(line)["step"] for line in path.read_bytes().splitlines()] == [1, 3]

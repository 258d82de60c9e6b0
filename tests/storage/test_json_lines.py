"""Lines of JSON with a checksum each."""

import json
import math
from pathlib import Path

import pytest

from next_core.storage.json_lines import append_json_line, json_line, parse_json_line


def test_a_line_is_read_back_and_is_ordinary_json() -> None:
    line = json_line({"step": 5, "text": "two\nlines", "ratio": math.inf, "list": [1.5, math.nan]})
    assert line.count(b"\n") == 1
    record = {"step": 5, "text": "two\nlines", "ratio": None, "list": [1.5, None]}
    assert parse_json_line(line) == parse_json_line(line.removesuffix(b"\n")) == record
    assert json.loads(line) == record | {"crc32": line[-11:-3].decode()}


def test_a_flipped_bit_anywhere_in_a_line_is_detected() -> None:
    line = json_line({"event": "jump", "step": 50, "accepted": True, "norm_ratio": 2.5})
    for at in range(len(line) - 1):
        damaged = bytearray(line)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match="checksum"):
            parse_json_line(bytes(damaged))


def test_a_torn_last_line_is_cut_off_before_the_next_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "cr')
    append_json_line(path, {"step": 3})
    assert [parse_json_line(line)["step"] for line in path.read_bytes().splitlines()] == [1, 3]

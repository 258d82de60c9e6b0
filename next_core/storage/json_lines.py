"""Strict JSON, and files that grow by one JSON object a line, each with its checksum."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from next_core.storage import atomic
from next_core.storage.reading import parse_checked, with_checksum


def json_text(value: Any) -> str:
    """Return one line of strict JSON; NaN and Inf, which JSON does not have, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_json_line(path: Path, record: Mapping[str, Any], durable: bool = True) -> None:
    """Append a JSON object as a line with its checksum. A torn last line is cut off first.

    Where ``durable``, it returns once the disk has the line; else the line survives the process, not a loss of power.
    Raises ``StorageError`` if the disk refuses; the file is then unchanged.
    """
    with atomic.disk_operation("appending to", path), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
        line = json_line(record)
        try:
            file.write(line[: len(line) // 2])
            file.flush()
            atomic.failpoint("within appending to", path)
            file.write(line[len(line) // 2 :])
            file.flush()
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)  # a full disk may have stored a part of the line
            raise


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return a JSON object as a line whose last key ``crc32`` is the CRC-32 of the bytes before it."""
    return with_checksum(json_text(dict(record))) + b"\n"


def parse_json_line(line: bytes) -> dict[str, Any]:
    """Return the record of a line of ``json_line``, with or without its end. Raises ``ValueError`` for any damage."""
    return parse_checked(line.removesuffix(b"\n"))

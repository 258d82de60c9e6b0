"""Small files, read so that nothing in their place can hurt: regular, bounded, UTF-8, JSON with numbers that fit.

What is wrong is told by ``OSError`` or ``ValueError``; who reads a file knows its name and the remedy.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zlib
from pathlib import Path
from typing import Any, NoReturn

SMALL = 4 * 2**20
"""Bytes of a file that a person could have written."""
LARGE = 128 * 2**20
"""Bytes of an index, a manifest, a log: Python's objects take up to some twenty times as much."""
_MOST = 2**64
_CHECKSUM = ', "crc32": "{:08x}"}}'
_LENGTH = len(_CHECKSUM.format(0))


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """All bytes of a regular file. Raises ``OSError``, or ``ValueError`` for anything else and for more than ``limit``.

    A FIFO or a device in its place is not waited for.
    """
    # Looked at first: opening a device can do things.
    _check_regular(path.stat(), path)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        _check_regular(os.fstat(file.fileno()), path)
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is too large: more than {limit} bytes")
    return data


def _check_regular(facts: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is no regular file")


def read_text(path: Path, limit: int = SMALL) -> str:
    """A UTF-8 file. Raises as ``read_bytes`` does; ``UnicodeDecodeError`` is a ``ValueError``."""
    return read_bytes(path, limit).decode("utf-8")


def parse_json(text: bytes | str, finite: bool = True) -> Any:
    """JSON as the standard has it, unless ``finite`` is false: then NaN and Infinity, which Python writes, are read.

    Raises ``ValueError`` for all else: for numbers that do not fit in 64 bits or in a double, and nesting without end.
    """
    options: dict[str, Any] = {"parse_constant": _no_json, "parse_float": _finite} if finite else {}
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_int=_bounded, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no double")
    return value


def _bounded(text: str) -> int:
    if len(text) <= 21 and -_MOST < (value := int(text)) < _MOST:
        return value
    raise ValueError(f"{text[:20]}... does not fit in 64 bits")


def with_checksum(text: str) -> bytes:
    """A JSON object with the CRC-32 of all the bytes before it as its last key, ``crc32``."""
    data = text.encode("utf-8")[:-1]  # without its }
    return data + _CHECKSUM.format(zlib.crc32(data)).encode()


def parse_checked(data: bytes) -> dict[str, Any]:
    """The object of ``with_checksum``, without the checksum. Raises ``ValueError`` for any damage."""
    body, checksum = data[:-_LENGTH], data[-_LENGTH:]
    if checksum[:12] != _CHECKSUM[:12].encode():
        raise ValueError("it has no checksum")
    if checksum != _CHECKSUM.format(zlib.crc32(body)).encode():
        raise ValueError("its checksum does not match")
    value = parse_json(body + b"}")
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - one kind of error for all damage
    return value

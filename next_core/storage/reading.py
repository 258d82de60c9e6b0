"""Bounded reads of small files and headers: regular files only, UTF-8, JSON whose numbers fit in 64 bits.

Problems are raised as ``OSError`` or ``ValueError``; callers know what the file is for and add the remedy.
"""

import json
import math
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SMALL = 4 * 2**20  # Limit in bytes for files that a person could have written
LARGE = 128 * 2**20
"""Limit in bytes for indexes, manifests and logs; as Python objects they take up to 20 times as much memory."""
_INTEGER_LIMIT = 2**64
_CHECKSUM = ', "crc32": "{:08x}"}}'
_CHECKSUM_LENGTH = len(_CHECKSUM.format(0))

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """Return the inode, size and modification time of a file, which change when it is replaced or rewritten."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """Return the bytes of a regular file.

    Raises ``OSError``, or ``ValueError`` for anything but a regular file and for more than ``limit`` bytes. It never
    opens a FIFO or a device, which could block or have side effects.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than the limit of {limit} bytes")
    return data


def read_text(path: Path, limit: int = SMALL) -> str:
    """Return the text of a UTF-8 file. Raises as ``read_bytes`` does; ``UnicodeDecodeError`` is a ``ValueError``."""
    return read_bytes(path, limit).decode("utf-8")


def parse_json(text: bytes | str, finite: bool = True) -> Any:
    """Parse JSON; with ``finite=False`` also NaN and Infinity, which Python's json module writes.

    Raises ``ValueError`` for invalid JSON, numbers that do not fit in 64 bits or in a double, and deep nesting.
    """
    options: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_int=_bounded, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} does not fit in a double")
    return value


def _bounded(text: str) -> int:
    if len(text) <= 21 and -_INTEGER_LIMIT < (value := int(text)) < _INTEGER_LIMIT:
        return value
    raise ValueError(f"{text[:20]}... does not fit in 64 bits")


def with_checksum(text: str) -> bytes:
    """Return a JSON object with a last key ``crc32``: the CRC-32 of all bytes before it."""
    data = text.encode("utf-8")[:-1]  # without the closing brace
    return data + _CHECKSUM.format(zlib.crc32(data)).encode()


def parse_checked(data: bytes) -> dict[str, Any]:
    """Return the object that ``with_checksum`` wrote, without its checksum. Raises ``ValueError`` for any damage."""
    body, checksum = data[:-_CHECKSUM_LENGTH], data[-_CHECKSUM_LENGTH:]
    if checksum[:12] != _CHECKSUM[:12].encode():
        raise ValueError("it has no checksum")
    if checksum != _CHECKSUM.format(zlib.crc32(body)).encode():
        raise ValueError("its checksum does not match")
    value = parse_json(body + b"}")
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - ValueError stands for all damage
    return value


MAX_HEADER = 100_000_000  # Bytes of a header, as the safetensors library limits it


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its precision as the format names it, its shape, and its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Offsets are not compared with the file: the safetensors library does that on opening. It accepts a name that appears
    twice, which is an error here. Raises ``OSError``, or ``ValueError`` for a malformed header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MAX_HEADER))
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        offsets = {name: tuple(facts["data_offsets"]) for name, facts in tensors.items()}
        return {
            name: Entry(tensors[name]["dtype"], tuple(tensors[name]["shape"]), offsets[name][1] - offsets[name][0])
            for name in sorted(tensors, key=lambda name: (offsets[name], name))
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is malformed: {error}") from None
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' appears twice")
    return dict(pairs)

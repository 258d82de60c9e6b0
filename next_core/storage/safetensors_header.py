"""The header of a safetensors file: its length in 8 bytes (little-endian), then JSON, then the tensors' bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
"""Bytes of a header, as the safetensors library limits it."""


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

"""Safetensors files written as a stream: memory holds one block of one tensor, never a whole file.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes in the
order of their offsets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from next_core.errors import NextCoreError
from next_core.sources.tensor_files import STORED
from next_core.storage.safetensors_header import Entry

DROP_EVERY = 64 * 2**20
"""Bytes between two syncs of a large file. Its pages then leave the page cache: filling fresh ones took four times the
CPU of all other work, and pushed out the checkpoints that are being read."""
NAMES = {dtype: name for name, dtype in STORED.items()}


def entry_of(dtype: torch.dtype, shape: Sequence[int]) -> Entry:
    """Return the header entry of a tensor."""
    return Entry(NAMES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)


def encoded_header(entries: Mapping[str, Entry], size: int | None = None) -> bytes:
    """Return length and header of a file with these tensors in this order, padded to ``size`` bytes if given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in entries.items():
        end = begin + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8 if size is None else size - 8
    return struct.pack("<Q", length) + text.ljust(length)


def header_room(names: Iterable[str]) -> int:
    """Return an upper bound of the header's bytes for a file of matrices with these names."""
    longest = Entry("BOOL", (2**63, 2**63), 0)
    return len(encoded_header(dict.fromkeys(names, longest))) + 40 * sum(1 for _ in names)


class TensorWriter:
    """A new safetensors file, filled tensor by tensor: ``with TensorWriter(...) as writer``.

    With ``entries`` (all tensors, in order) the header comes first, ``write`` takes the tensors' bytes in blocks, and
    ``sha256`` is the digest of the closed file. Without them, ``add`` takes whole tensors of any shape, the header is
    written last into ``room`` bytes kept free for it, and there is no digest.

    The file is durable (fsync) after the ``with``. Raises ``OSError`` with the file's name.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None, room: int = 0) -> None:
        self.path = path
        self.sha256: str | None = None
        self._entries: dict[str, Entry] = dict(entries or {})
        self._hash = None if entries is None else hashlib.sha256()
        header = bytes(8 + -(-room // 8) * 8) if entries is None else encoded_header(entries)
        self._header, self._written, self._cached = len(header), 0, 0
        self._file = path.open("xb")
        self._put(header)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a whole tensor; for a file without ``entries``."""
        self._entries[name] = entry_of(tensor.dtype, tensor.shape)
        self.write(tensor)

    def write(self, block: Tensor) -> None:
        """Append the next rows of the tensor whose turn it is."""
        flat = block.detach().contiguous().reshape(-1)
        if flat.numel():
            self._put(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _put(self, data: bytes | memoryview) -> None:
        if self._hash is not None:
            self._hash.update(data)
        with self._naming_the_file():
            self._file.write(data)
            self._written += len(data)
            self._cached += len(data)
            if self._cached >= DROP_EVERY and hasattr(os, "posix_fadvise"):
                self._sync()
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                self._cached = 0

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _finish(self) -> None:
        header = encoded_header(self._entries, self._header)
        size = len(header) + sum(entry.nbytes for entry in self._entries.values())
        if (len(header), self._written) != (self._header, size):
            problem = f"{self.path}: {self._written} bytes were written, the header needs {size}"
            raise NextCoreError(problem, kind="numbers-shape")
        if self._hash is None:
            self._file.seek(0)
            self._file.write(header)
        else:
            self.sha256 = self._hash.hexdigest()
        self._sync()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._naming_the_file():
            try:
                if kind is None:
                    self._finish()
            finally:
                self._file.close()

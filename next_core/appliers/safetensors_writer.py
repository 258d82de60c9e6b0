"""Safetensors files written as a stream: memory holds one block of one tensor, never a whole file.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes in the
order of their offsets.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from next_core.errors import wrong_shape
from next_core.sources.tensor_files import STORED
from next_core.storage.reading import Entry

BUFFER = 4 * 2**20
"""Bytes written at a time, past the page cache: filling that would add a sixth to the CPU time of an export and push
out the checkpoints that are being read."""
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
    ``digest`` is that of the closed file. Without them, ``add`` takes whole tensors of any shape, the header is
    written last into ``room`` bytes kept free for it, and there is no digest.

    Making the file durable is left to the caller. A write that fails raises ``OSError`` with the file's name.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None, room: int = 0) -> None:
        self.path = path
        self.digest: str | None = None
        self._entries: dict[str, Entry] = dict(entries or {})
        self._hash = None if entries is None else xxhash.xxh3_128()
        header = bytes(8 + -(-room // 8) * 8) if entries is None else encoded_header(entries)
        self._header, self._written = len(header), 0
        self._file = path.open("xb", buffering=0)
        self._buffer, self._filled = mmap.mmap(-1, BUFFER), 0  # aligned to pages, as direct writes require
        self._direct = self._set_direct(True)
        self._put(memoryview(header))

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a whole tensor; for a file without ``entries``."""
        self._entries[name] = entry_of(tensor.dtype, tensor.shape)
        self.write(tensor)

    def write(self, block: Tensor) -> None:
        """Append the next rows of the tensor whose turn it is."""
        flat = block.detach().contiguous().reshape(-1)
        if flat.numel():
            self._put(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _put(self, data: memoryview) -> None:
        if self._hash is not None:
            self._hash.update(data)
        self._written += data.nbytes
        while data.nbytes:
            part = data[: BUFFER - self._filled]
            self._buffer[self._filled : self._filled + part.nbytes] = part
            self._filled += part.nbytes
            data = data[part.nbytes :]
            if self._filled == BUFFER:
                self._flush()

    def _flush(self) -> None:
        if self._filled % mmap.PAGESIZE:  # the end of the file
            self._direct = self._set_direct(False)
        done = 0
        while done < self._filled:
            try:
                with memoryview(self._buffer) as whole, whole[done : self._filled] as rest:
                    done += self._file.write(rest) or 0
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
                self._direct = self._set_direct(False)  # a file system without direct writes
        self._filled = 0

    def _set_direct(self, on: bool) -> bool:
        """Bypass the page cache, or stop doing so. Returns whether it is bypassed."""
        flag, file = getattr(os, "O_DIRECT", 0), self._file.fileno()
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
        except OSError:
            return False
        return on and flag != 0

    def _finish(self) -> None:
        header = encoded_header(self._entries, self._header)
        size = len(header) + sum(entry.nbytes for entry in self._entries.values())
        if (len(header), self._written) != (self._header, size):
            raise wrong_shape(f"{self.path}: {self._written} bytes were written, the header needs {size}")
        self._flush()
        if self._hash is None:
            self._direct = self._set_direct(False)
            os.pwrite(self._file.fileno(), header, 0)
        else:
            self.digest = self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._buffer:
            if kind is None:
                self._finish()

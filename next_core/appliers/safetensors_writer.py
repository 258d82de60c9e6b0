"""Safetensors files written as a stream: memory holds one block of one tensor, never a whole file.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes in the
order of their offsets.
"""

import errno
import fcntl
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
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


def encoded_header(entries: Mapping[str, Entry]) -> bytes:
    """Return length and header of a file with these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in entries.items():
        end = begin + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8
    return struct.pack("<Q", length) + text.ljust(length)


class TensorWriter:
    """A new safetensors file, filled tensor by tensor: ``with TensorWriter(...) as writer``.

    ``entries`` are those of all tensors, in order; ``write`` takes their bytes in blocks. ``digest`` is that of the
    closed file.

    Making the file durable is left to the caller. A write that fails raises ``OSError`` with the file's name.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path = path
        self._hash = xxhash.xxh3_128()
        header = encoded_header(entries)
        self._size, self._written = len(header) + sum(entry.nbytes for entry in entries.values()), 0
        self._file = path.open("xb", buffering=0)
        self._buffer, self._filled = mmap.mmap(-1, BUFFER), 0  # aligned to pages, as direct writes require
        self._direct = self._set_direct(True)
        self._put(memoryview(header))

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, block: Tensor) -> None:
        """Append the next rows of the tensor whose turn it is."""
        flat = block.detach().contiguous().reshape(-1)
        if flat.numel():
            self._put(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _put(self, data: memoryview) -> None:
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
        if self._written != self._size:
            raise wrong_shape(f"{self.path}: {self._written} bytes were written, the header needs {self._size}")
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._buffer:
            if kind is None:
                self._finish()

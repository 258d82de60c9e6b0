"""Safetensors files written as a stream: one block of one tensor in memory, never a whole file.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes, one
after another in the order of their offsets.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from next_core.errors import CheckpointError, NextCoreError
from next_core.sources.tensor_files import STORED
from next_core.storage.safetensors_header import Entry, read_header

_BUFFER = 4 * 2**20
_DIRECT_FROM = 64 * 2**20
"""Files of at least this size bypass the page cache, which costs several times the CPU and evicts what is read."""
NAMES = {dtype: name for name, dtype in STORED.items()}


def entry_of(tensor: Tensor) -> Entry:
    """Return the header entry of a tensor."""
    return Entry(NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file in the order of their bytes. Raises ``CheckpointError`` naming the file."""
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); restore it", kind="checkpoint-damaged"
        ) from None


def encoded_header(entries: Mapping[str, Entry], size: int | None = None) -> bytes:
    """Length and header of a file that holds these tensors in this order; padded to ``size`` bytes where given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, begin + entry.nbytes],
        }
        begin += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8 if size is None else size - 8
    if len(text) > length:
        raise NextCoreError(
            f"a safetensors header of {len(text)} bytes does not fit the {length} that were kept for it"
        )
    return struct.pack("<Q", length) + text.ljust(length)


class TensorWriter:
    """A new safetensors file, filled tensor by tensor; ``with TensorWriter(...) as writer``.

    With ``entries`` (all tensors, in order) the header is written first, ``write`` takes their bytes in blocks, and
    ``sha256`` is the digest of the file once it is closed. Without, ``add`` takes whole tensors of any shape, at most
    ``room`` bytes of header are kept free for them, and there is no digest.

    The file is on disk (fsync) after the ``with``. Errors of the disk are ``OSError`` with the file's name.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None, room: int = 0) -> None:
        self.path = path
        self.sha256: str | None = None
        self._entries: dict[str, Entry] = dict(entries or {})
        self._announced = entries is not None
        self._hash = hashlib.sha256()
        self._buffer = mmap.mmap(-1, _BUFFER)  # aligned to pages, as direct writes need it
        self._filled = 0
        self._written = 0
        header = encoded_header(self._entries) if self._announced else bytes(8 + -(-room // 8) * 8)
        self._header = len(header)
        self._size = len(header) + sum(entry.nbytes for entry in self._entries.values())
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = self._announced and self._size >= _DIRECT_FROM and self._set_direct(True)
        self._put(memoryview(header))

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor, whole; for a file whose tensors were not announced."""
        self._entries[name] = entry_of(tensor)
        self.write(tensor)

    def write(self, block: Tensor) -> None:
        """The next bytes: rows of the tensor whose turn it is."""
        flat = block.detach().contiguous().reshape(-1)
        if flat.numel():
            self._put(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _put(self, data: memoryview) -> None:
        if self._announced:
            self._hash.update(data)
        while data.nbytes:
            taken = min(_BUFFER - self._filled, data.nbytes)
            self._buffer[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if self._filled == _BUFFER:
                self._flush()

    def _flush(self) -> None:
        if self._direct and self._filled % mmap.PAGESIZE:
            self._direct = not self._set_direct(False)  # the end of the file: not a whole page
        with memoryview(self._buffer) as whole:
            done = 0
            while done < self._filled:
                try:
                    with whole[done : self._filled] as rest:
                        done += os.write(self._descriptor, rest)
                except OSError as error:
                    if error.errno == errno.EINVAL and self._direct:  # a file system without direct writes
                        self._direct = not self._set_direct(False)
                        continue
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._written += self._filled
        self._filled = 0

    def _set_direct(self, on: bool) -> bool:
        """Whether the page cache could be switched off (or on again)."""
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            return False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
        except OSError:
            return False
        return True

    def _finish(self) -> None:
        self._flush()
        if self._announced and self._written != self._size:
            raise NextCoreError(f"{self.path}: {self._written} bytes were written, the header says {self._size}")
        if not self._announced:
            os.pwrite(self._descriptor, encoded_header(self._entries, self._header), 0)
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.sha256 = self._hash.hexdigest() if self._announced else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._descriptor)
            with contextlib.suppress(BufferError):
                self._buffer.close()


def header_room(names: Iterable[str]) -> int:
    """Bytes that the header of a file of these matrices can need at most."""
    longest = Entry("BOOL", (2**63, 2**63), 0)
    return len(encoded_header(dict.fromkeys(names, longest))) + 40 * sum(1 for _ in names)

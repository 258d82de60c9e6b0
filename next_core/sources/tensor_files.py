"""Files of a checkpoint, read safely: JSON objects, and tensors through a memory map."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.storage.manifest import check_contents
from next_core.storage.reading import SMALL, parse_json, read_bytes
from next_core.storage.safetensors_header import read_header

SNAPSHOTS, BLOBS = "snapshots", "blobs"
COMMIT = re.compile(r"[0-9a-f]{40}")
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the precisions."""


def read_json(path: Path, limit: int = SMALL, *, verify: bool = False) -> dict[str, Any]:
    """A JSON object of at most ``limit`` bytes, with NaN and Infinity, as other programs of Python write them.

    Raises ``CheckpointError`` naming the file when it is missing or damaged. To ``verify`` is to compare its bytes with
    the manifest of its folder, where there is one.
    """
    try:
        value = parse_json(read_bytes(path, limit), finite=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete: remove or restore it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove or restore this checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where a JSON object is expected")
    if verify:
        check_contents(path)
    return value


def hub_repo(folder: Path) -> Path | None:
    """The repository in a Hugging Face Hub cache whose snapshot this folder is or lies in."""
    here = folder.resolve()
    for path in (here, *here.parents):
        if COMMIT.fullmatch(path.name) and path.parent.name == SNAPSHOTS and "--" in path.parent.parent.name:
            return path.parent.parent
    return None


def check_file(path: Path) -> None:
    """Raise ``CheckpointError`` unless ``path`` is a file that lies, links followed, in the folder that names it.

    A folder may itself be reached by a link, and a snapshot of a Hub cache links to the blobs of its repository.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder where a file is expected; remove or restore this checkpoint")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; remove or restore this checkpoint")
    if not path.is_file():
        what = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path} {what}; the checkpoint is incomplete: remove or restore it")
    if path.is_symlink():
        target, repo = path.resolve(), hub_repo(path.parent)
        own = target.is_relative_to(path.parent.resolve())
        if not own and not (repo is not None and target.parent == repo / BLOBS):
            raise CheckpointError(f"{path} is a link out of its folder, to {target}; put the file itself there")


class TensorFile(ABC):
    """One file of named tensors: shapes and precisions at once, values on demand.

    ``shapes`` maps each name to its shape; ``stamp`` identifies the file as it was opened. Before the first values are
    read, its bytes are compared with the manifest of its folder, where there is one.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        self.path = path
        self.stamp = stamp(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._verified = False

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """The precision a tensor is stored in."""

    @abstractmethod
    def _values(self, key: str, rows: slice | None) -> Tensor:
        """One tensor, or some rows of it, as stored. Raises ``CheckpointError`` for a name that is not there."""

    def verify(self) -> None:
        """Raise ``CheckpointError`` when the bytes that hold the values are not those that were written."""
        check_contents(self.path)

    def raw(self, key: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some rows of it, as stored; that it is finite is not checked."""
        if not self._verified:
            self.verify()
            self._verified = True
        return self._values(key, rows)

    def settled_by(self) -> list[Path]:
        """The files on disk that decide its values."""
        return [self.path]

    def unchanged(self) -> bool:
        """Whether the file on disk is still the one that was opened."""
        return as_stamped(self.path, self.stamp)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """One tensor or some rows of it, at least fp32. Raises ``CheckpointError`` when they hold NaN or Inf."""
        tensor = self.raw(key, rows)
        if tensor.dtype.itemsize < 4:
            tensor = tensor.float()
        if not tensor.is_floating_point():
            return tensor
        # A sum is finite only if its terms are: one pass in the tensor's own precision, 20 times faster than in fp64.
        # The converse fails where finite terms overflow, so only then each is looked at.
        if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.path}: '{key}' holds NaN or Inf; remove this checkpoint")
        return tensor


Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp:
    """What tells a file from another one of its name: inode, size and time."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def as_stamped(path: Path, then: Stamp) -> bool:
    """Whether the file on disk is still the one that had this stamp."""
    try:
        return stamp(path) == then
    except OSError:
        return False


class SafetensorsFile(TensorFile):
    """One safetensors file: shapes from its header, tensors on demand through a memory map."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
            entries = read_header(path)
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}); remove or restore this checkpoint"
            ) from None
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self._stored = {name: entry.dtype for name, entry in entries.items()}

    def dtype(self, key: str) -> torch.dtype:
        stored = self._stored.get(key)
        if stored is None:
            raise CheckpointError(f"{self.path}: no tensor '{key}'")
        if stored not in STORED:
            raise CheckpointError(f"{self.path}: '{key}' is stored as {stored}; known are {', '.join(STORED)}")
        return STORED[stored]

    def _values(self, key: str, rows: slice | None) -> Tensor:
        self.dtype(key)  # known, and one that torch has
        tensor: Tensor = self._file.get_tensor(key) if rows is None else self._file.get_slice(key)[rows]
        return tensor

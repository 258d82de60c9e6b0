"""Files of a checkpoint, read safely: JSON objects, and tensors through a memory map."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from next_core.errors import CheckpointError, damaged, describe, incomplete, not_found, unsafe_path
from next_core.sources.hub import BLOBS, hub_repo
from next_core.storage.manifest import check_contents
from next_core.storage.reading import SMALL, Stamp, parse_json, read_bytes, read_header, stamp

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
"""The precisions by their names in safetensors."""

Place = slice | tuple[int, slice]  # Some rows of a tensor, or of one matrix in a stack


def read_json(path: Path, limit: int = SMALL, *, verify: bool = False) -> dict[str, Any]:
    """Return a JSON object of at most ``limit`` bytes; NaN and Infinity, which Python's json writes, are allowed.

    With ``verify`` its bytes are compared with the manifest of its folder, if there is one. Raises ``CheckpointError``
    for a missing or damaged file.
    """
    try:
        value = parse_json(read_bytes(path, limit), finite=False)
    except FileNotFoundError:
        raise incomplete(path, "is missing") from None
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise damaged(path, f"contains a {type(value).__name__} instead of a JSON object")
    if verify:
        check_contents(path)
    return value


def check_file(path: Path) -> None:
    """Raise ``CheckpointError`` unless ``path`` is a file that lies, links followed, in the folder that names it.

    The folder itself may be a link, and a snapshot of a Hub cache links to the blobs of its repository.
    """
    if not path.exists():
        raise incomplete(path, "is a link to a missing file" if path.is_symlink() else "is missing")
    if not path.is_file():
        raise damaged(path, "is not a regular file")
    if path.is_symlink():
        target, repo = path.resolve(), hub_repo(path.parent)
        inside = target.is_relative_to(path.parent.resolve())
        if not inside and not (repo is not None and target.parent == repo / BLOBS):
            raise unsafe_path(f"{path} is a link out of its folder, to {target}; put the file itself there")


class TensorFile(ABC):
    """One file of named tensors: shapes and precisions are known on opening, values are read on demand.

    ``shapes`` maps each name to its shape. Before the first values are read, the bytes of the file are compared with
    the manifest of its folder, if there is one.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stamp = stamp(path)
        self._verified = False

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """Return the precision a tensor is stored in. Raises ``CheckpointError`` for an unknown name."""

    @abstractmethod
    def _values(self, key: str, rows: Place | None) -> Tensor:
        """Return a tensor, or some of its rows, as stored. Raises ``CheckpointError`` for an unknown name."""

    def verify(self) -> None:
        """Raise ``CheckpointError`` if the bytes of the files differ from their manifest."""
        for path in self.weight_files():
            check_contents(path)

    def raw(self, key: str, rows: Place | None = None) -> Tensor:
        """Return a tensor, or some of its rows, as stored; its values may be NaN or Inf."""
        if not self._verified:
            self.verify()
            self._verified = True
        return self._values(key, rows)

    def weight_files(self) -> list[Path]:
        """Return the files on disk that determine the values."""
        return [self.path]

    def unchanged(self) -> bool:
        """Return whether the file on disk is still the one that was opened."""
        return is_unchanged(self.path, self._stamp)

    def read(self, key: str, rows: Place | None = None) -> Tensor:
        """Return a tensor, or some of its rows, in at least fp32. Raises ``CheckpointError`` for NaN or Inf."""
        tensor = self.raw(key, rows)
        if tensor.dtype.itemsize < 4:
            tensor = tensor.float()
        if not tensor.is_floating_point():
            return tensor
        # A sum is finite only if its terms are, and one pass in the tensor's own precision is 20 times faster than
        # in fp64. Finite terms can overflow, though, so each value is looked at if the sum is not finite.
        if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.path}: '{key}' contains NaN or Inf; remove this checkpoint", kind="checkpoint-not-finite"
            )
        return tensor

    def _unknown(self, key: str) -> CheckpointError:
        return not_found(f"{self.path} has no tensor '{key}'")


Replacement = Callable[[TensorFile], TensorFile]  # What a source may wrap the files in that it opens


def is_unchanged(path: Path, then: Stamp) -> bool:
    """Return whether a file still has the stamp it had."""
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
            raise damaged(path, f"is truncated or not a safetensors file ({error})") from None
        self._last: tuple[str, Tensor] = "", torch.empty(0)
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self._stored = {name: entry.dtype for name, entry in entries.items()}

    def dtype(self, key: str) -> torch.dtype:
        stored = self._stored.get(key)
        if stored is None:
            raise self._unknown(key)
        if stored not in STORED:
            raise damaged(self.path, f"stores '{key}' as {stored}, not as one of {', '.join(STORED)}")
        return STORED[stored]

    def _values(self, key: str, rows: Place | None) -> Tensor:
        self.dtype(key)  # raises for an unknown name or precision
        if self._last[0] != key:  # a view of the mapped file, which is made once for all blocks of rows
            self._last = key, self._file.get_tensor(key)
        return self._last[1] if rows is None else self._last[1][rows]


PICKLE = ".bin"


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorFile:
    """Open a file of tensors by its suffix.

    Raises ``CheckpointError`` for a missing or damaged file, and for a pickle unless these are allowed.
    """
    if path.suffix != PICKLE:
        return SafetensorsFile(path)
    refuse_pickle(path, allow_pickle)
    return PickleFile(path)


def refuse_pickle(path: Path, allow_pickle: bool) -> None:
    """Raise ``CheckpointError`` for a pickle unless these are allowed."""
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run code; convert it to safetensors, or allow it with allow_pickle=True "
            "(--allow-pickle), which reads only tensors from it",
            kind="checkpoint-pickle",
        )


class PickleFile(TensorFile):
    """A file of ``torch.save`` with a dict of tensors, memory-mapped by torch's weights-only reader."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or hostile pickle can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise _not_tensors(path, f"is damaged, or contains more than tensors ({reason})") from None
        if not isinstance(loaded, dict):
            raise _not_tensors(path, f"contains a {type(loaded).__name__} instead of a dict of tensors")
        try:
            self._tensors = {key: self._plain(key, value) for key, value in loaded.items()}
        except CheckpointError:
            raise
        except Exception as error:  # what is missing in a tensor of another class
            raise _not_tensors(path, f"contains a tensor that cannot be read ({describe(error)})") from None
        self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}

    def _plain(self, key: Any, value: Any) -> Tensor:
        """Return a value that was loaded. Raises ``CheckpointError`` for anything but a plain tensor."""
        # A tensor larger than its storage (stride 0) would be allocated by the first computation.
        if (
            not isinstance(key, str)
            or not isinstance(value, Tensor)
            or (value.layout, value.device.type, value.is_quantized) != (torch.strided, "cpu", False)
            or (value.numel() * value.element_size() > value.untyped_storage().nbytes())
        ):
            raise _not_tensors(self.path, f"contains {key!r}, which is not a plain tensor")
        return value.detach()

    def dtype(self, key: str) -> torch.dtype:
        return self._values(key, None).dtype

    def _values(self, key: str, rows: Place | None) -> Tensor:
        if key not in self._tensors:
            raise self._unknown(key)
        return self._tensors[key] if rows is None else self._tensors[key][rows]


def _not_tensors(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}; restore it, or save the model's weights alone as safetensors", kind="checkpoint-damaged"
    )

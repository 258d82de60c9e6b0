"""Checkpoints of ``torch.distributed.checkpoint``: ``.metadata`` and ``*.distcp``, as accelerate saves FSDP2's.

torch unpickles the metadata without restriction. Here only the classes that torch writes into it are allowed.
"""

import enum
import functools
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from next_core.errors import CheckpointError, damaged, describe, incomplete, unsafe_path
from next_core.sources.tensor_files import Place, TensorFile, check_file, is_unchanged, refuse_pickle
from next_core.storage.reading import LARGE, read_bytes, stamp

METADATA = ".metadata"
DISTRIBUTED = (METADATA, f"pytorch_model_fsdp_0/{METADATA}")
"""Where the metadata lie in a checkpoint: alone, or in the folder that accelerate makes."""
DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if type(value) is torch.dtype}
CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "torch": {"Size", *DTYPES},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":
            return PurePosixPath  # where the checkpoint was written
        if (module, name) == ("builtins", "getattr"):  # so Python before 3.11.4 pickles the members of enumerations
            return _member
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> enum.Enum:
    """Return a member of an enumeration, and no other attribute of anything."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"it names {name} of {kind}")
    return kind[name]


def open_distributed(folder: Path, allow_pickle: bool = False) -> TensorFile:
    """Open the model in a checkpoint. Raises ``CheckpointError`` for a damaged one, and unless pickles are allowed."""
    path = next(folder / name for name in DISTRIBUTED if (folder / name).exists())
    refuse_pickle(path, allow_pickle)
    return DistributedFile(path)


class DistributedFile(TensorFile):
    """The model of a checkpoint, of which each tensor is stored as chunks; optimizer states are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._chunks: dict[str, list[tuple[Any, Any]]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        try:
            metadata = _MetadataUnpickler(io.BytesIO(read_bytes(path, LARGE))).load()
            for key, stored in metadata.state_dict_metadata.items():
                # {"model": state} is saved as "model.NAME", and the planner remembers where the name begins.
                *above, name = (metadata.planner_data or {}).get(key, (key,))
                if hasattr(stored, "chunks") and above in ([], ["model"], ["app", "model"]):
                    self._add(str(name), key, stored, metadata.storage_data)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged or hostile pickle can raise anything
            raise damaged(path, f"cannot be read ({describe(error)})") from None
        if not self.shapes:
            raise CheckpointError(f"{path} lists no tensor of a model", kind="checkpoint-unknown-layout")
        files = {info.relative_path for chunks in self._chunks.values() for _, info in chunks}
        self._stamps = {self.path.parent / name: stamp(self.path.parent / name) for name in sorted(files)}
        # Neighbouring rows are read one block after another.
        self._chunk: Callable[[str, int], Tensor] = functools.lru_cache(2)(self._load)

    def _add(self, name: str, key: str, stored: Any, storage: Any) -> None:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        shape, found, volume = tuple(stored.size), [], 0.0
        for chunk in stored.chunks:
            info = storage[MetadataIndex(key, chunk.offsets)]
            file = self.path.parent / info.relative_path
            if PurePosixPath(info.relative_path).name != info.relative_path:
                raise unsafe_path(f"{self.path} names a file outside its folder: {info.relative_path!r}")
            check_file(file)
            if file.stat().st_size < info.offset + info.length:
                raise incomplete(file, "is truncated")
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(
                    f"{file} is compressed ({info.transform_descriptors}); save it without extensions",
                    kind="checkpoint-unsupported-model",
                )
            size, places = math.prod(chunk.sizes), zip(chunk.offsets, chunk.sizes, shape, strict=True)
            fits = all(0 <= at <= at + n <= whole for at, n, whole in places)
            fits = fits and size * stored.properties.dtype.itemsize <= info.length
            volume += size if fits else math.inf
            found.append((chunk, info))
        if volume != math.prod(shape):
            raise damaged(self.path, f"lists chunks of '{key}' that do not make up {shape}")
        self.shapes[name], self._chunks[name], self._dtypes[name] = shape, found, stored.properties.dtype

    def dtype(self, key: str) -> torch.dtype:
        if key not in self._dtypes:
            raise self._unknown(key)
        return self._dtypes[key]

    def weight_files(self) -> list[Path]:
        return [self.path, *self._stamps]

    def unchanged(self) -> bool:
        return super().unchanged() and all(is_unchanged(path, then) for path, then in self._stamps.items())

    def _values(self, key: str, rows: Place | None) -> Tensor:
        dtype, shape = self.dtype(key), self.shapes[key]
        first = rows if isinstance(rows, slice) else slice(None) if rows is None else slice(rows[0], rows[0] + 1)
        begin, end, _ = first.indices(shape[0]) if shape else (0, 1, 1)
        # A gap between chunks shows as NaN.
        fill = math.nan if dtype.is_floating_point else 0
        whole = torch.full((max(end - begin, 0), *shape[1:]) if shape else (), fill, dtype=dtype)
        for number, (chunk, _) in enumerate(self._chunks[key]):
            if not shape:
                return self._chunk(key, number)
            low, high = max(begin, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
            if low < high:
                others = tuple(slice(at, at + n) for at, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                part = self._chunk(key, number)[low - chunk.offsets[0] : high - chunk.offsets[0]]
                whole[(slice(low - begin, high - begin), *others)] = part
        return whole[0, rows[1]] if isinstance(rows, tuple) else whole

    def _load(self, key: str, number: int) -> Tensor:
        chunk, info = self._chunks[key][number]
        path = self.path.parent / info.relative_path
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                value = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
            if (tuple(value.shape), value.dtype) != (tuple(chunk.sizes), self._dtypes[key]):
                raise ValueError(f"it holds {tuple(value.shape)} of {value.dtype}")  # noqa: TRY301
        except Exception as error:
            raise damaged(path, f"holds no such part of '{key}' ({describe(error)})") from None
        result: Tensor = value.detach()
        return result

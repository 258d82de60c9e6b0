"""Weights that FSDP sharded, one file for each process: ``model_world_size_W_rank_R.pt``, as verl and SkyRL save them.

Each file holds the process's part of every DTensor, with the placement that says how the parts fit together.
"""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from next_core.errors import CheckpointError, damaged, incomplete
from next_core.sources.tensor_files import PickleFile, Place, TensorFile, refuse_pickle

SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
CONFIGS = "huggingface"  # The folder next to the shards with the model's config and tokenizer
LORA = "lora_train_meta.json"  # What verl says about an adapter: its rank and alpha
ADAPTER_KEY = re.compile(r"\.lora_|\.modules_to_save\.|\.trainable_tokens_delta")
"""The tensors of a model with an adapter that are the adapter's."""
MERGER = "python -m verl.model_merger merge --backend fsdp --local_dir {} --target_dir FOLDER"


def shards_folder(folder: Path) -> Path:
    """Return where the shards lie of which a folder holds the config."""
    return folder.parent if folder.name == CONFIGS else folder


def has_shards(folder: Path) -> bool:
    """Return whether a folder, or the one above its configs, contains shards."""
    return any(SHARD.fullmatch(path.name) for path in shards_folder(folder).glob("model_world_size_*"))


def open_shards(folder: Path, allow_pickle: bool = False, *, writable: bool = False) -> ShardedFile:
    """Open the shards of a folder as one file, whose ``write`` changes them if it is ``writable``.

    Raises ``CheckpointError`` unless pickles are allowed, for a missing shard, and for parts that do not fit together.
    """
    folder = shards_folder(folder)
    found = {path: match for path in folder.glob("model_world_size_*") if (match := SHARD.fullmatch(path.name))}
    sizes = sorted({int(match[1]) for match in found.values()})
    if len(sizes) != 1:
        raise CheckpointError(
            f"{folder} has shards of {' and of '.join(map(str, sizes))} processes; keep those of one save",
            kind="checkpoint-damaged",
        )
    paths = [folder / f"model_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])]
    missing = next((path for path in paths if path not in found), None)
    if missing is not None:
        raise incomplete(missing, f"is missing, one of {sizes[0]} shards")
    refuse_pickle(paths[0], allow_pickle)
    return ShardedFile(paths, writable)


@dataclass(frozen=True)
class _Part:
    """One process's part of a tensor of ``shape``: the part ``place`` along dimension ``dim``."""

    local: Tensor
    shape: tuple[int, ...]
    dim: int = 0
    place: int = 0


class _Shard(PickleFile):
    """The file of one process."""

    def __init__(self, path: Path) -> None:
        import torch.distributed.tensor  # noqa: F401 - so that torch's weights-only reader knows DTensor

        self.parts: dict[str, _Part] = {}
        logger = logging.getLogger("torch.distributed.device_mesh")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of each mesh that is read outside its process group
        try:
            super().__init__(path)
        finally:
            logger.setLevel(level)

    def _plain(self, key: Any, value: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(value, DTensor):  # a buffer, or a parameter that FSDP leaves whole
            local = super()._plain(key, value)
            self.parts[key] = _Part(local, tuple(local.shape))
            return local
        local, placements = super()._plain(key, value._local_tensor), value.placements
        sharded = [(axis, p.dim) for axis, p in enumerate(placements) if type(p) is Shard]
        known = all(type(p) is Replicate or (type(p) is Shard and 0 <= p.dim < value.dim()) for p in placements)
        if len(sharded) > 1 or not known:
            raise CheckpointError(
                f"{self.path} stores '{key}' with the placements {placements}, not sharded along one dimension; merge "
                f"the checkpoint with its trainer's own tool, such as {MERGER.format(self.path.parent)}",
                kind="checkpoint-unsupported-model",
            )
        # The mesh of another version of torch lacks what its properties need, but not this.
        coordinate = vars(value._spec.mesh)["_coordinate_on_dim"]
        axis, dim = sharded[0] if sharded else (0, 0)
        self.parts[key] = _Part(local, tuple(value.shape), dim, int(coordinate[axis]) if sharded else 0)
        return local


class ShardedFile(TensorFile):
    """The shards of a model as one file of whole tensors; each is joined when it is read.

    Several copies of a part (buffers, hybrid sharding) must be equal. With ``writable``, ``write`` changes the files.
    """

    def __init__(self, paths: Sequence[Path], writable: bool = False) -> None:
        super().__init__(paths[0])
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE):
            self._shards = [_Shard(path) for path in paths]
        self._copies: dict[str, list[list[Tensor]]] = {}  # By name the parts in their order, each with its copies
        self._dims: dict[str, int] = {}
        for key in sorted(set().union(*(shard.parts for shard in self._shards))):
            lacking = next((shard for shard in self._shards if key not in shard.parts), None)
            if lacking is not None:
                raise damaged(lacking.path, f"has no '{key}', which other shards have")
            self._join(key, [shard.parts[key] for shard in self._shards])

    def _join(self, key: str, parts: Sequence[_Part]) -> None:
        """Order the parts of a tensor, and check that they make up the whole."""
        shape, dim = parts[0].shape, parts[0].dim
        copies = [[part.local for part in parts if part.place == place] for place in sorted({p.place for p in parts})]
        others = shape[:dim], shape[dim + 1 :]
        if (
            {(part.shape, part.dim, part.local.dtype) for part in parts} != {(shape, dim, parts[0].local.dtype)}
            or any((part.local.shape[:dim], part.local.shape[dim + 1 :]) != others for part in parts)
            or len({(part.place, part.local.shape) for part in parts}) != len(copies)
            or (len(shape) > 0 and sum(same[0].shape[dim] for same in copies) != shape[dim])
        ):
            raise CheckpointError(
                f"{self.path.parent}: the parts of '{key}' do not make up {shape}; restore its shards",
                kind="checkpoint-damaged",
            )
        self.shapes[key], self._dims[key], self._copies[key] = shape, dim, copies

    def dtype(self, key: str) -> torch.dtype:
        if key not in self._copies:
            raise self._unknown(key)
        return self._copies[key][0][0].dtype

    def weight_files(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def unchanged(self) -> bool:
        return all(shard.unchanged() for shard in self._shards)

    def _values(self, key: str, rows: Place | None) -> Tensor:
        self.dtype(key)  # raises for an unknown name
        parts, dim = self._rows(key, rows if isinstance(rows, slice) else slice(rows[0], rows[0] + 1) if rows else None)
        for first, *others in parts:
            if not all(torch.allclose(first, other, rtol=0, atol=0, equal_nan=True) for other in others):
                raise CheckpointError(
                    f"{self.path.parent}: the copies of '{key}' differ between processes; restore its shards",
                    kind="checkpoint-damaged",
                )
        whole = parts[0][0] if len(parts) == 1 else torch.cat([first for first, *_ in parts], dim)
        return whole[0, rows[1]] if isinstance(rows, tuple) else whole

    def _rows(self, key: str, rows: slice | None) -> tuple[list[list[Tensor]], int]:
        """Return views of some rows in each part, and the dimension along which they are joined."""
        copies, dim = self._copies[key], self._dims[key]
        if rows is None:
            return copies, dim
        if dim > 0:
            return [[part[rows] for part in same] for same in copies], dim
        begin, end, _ = rows.indices(self.shapes[key][0])
        cut, at = [], 0
        for same in copies:
            size = same[0].shape[0]
            if begin < at + size and at < end:
                cut.append([part[max(begin - at, 0) : end - at] for part in same])
            at += size
        return cut or [[part[:0] for part in copies[0]]], dim

    def write(self, key: str, blocks: Iterable[Tensor], index: int | None = None) -> None:
        """Overwrite a tensor on disk by blocks of its rows, in every copy; with ``index`` one matrix of a stack."""
        at = index or 0
        for block in blocks if index is None else [torch.cat(list(blocks))[None]]:
            parts, dim = self._rows(key, slice(at, at + len(block)))
            at, begin = at + len(block), 0
            for same in parts:
                size = same[0].shape[dim]
                for part in same:
                    part.copy_(block.narrow(dim, begin, size))
                begin += size

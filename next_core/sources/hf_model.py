"""The weight files of one Hugging Face model folder, sharded or not, read one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.sources.layouts import MODEL_FILES, MODEL_PICKLES
from next_core.sources.pickles import open_tensors
from next_core.sources.tensor_files import Stamp, TensorFile, as_stamped, read_json, stamp
from next_core.storage.reading import LARGE

SINGLE, INDEX = MODEL_FILES
PICKLE_SINGLE, PICKLE_INDEX = MODEL_PICKLES
MODEL_CONFIG = "config.json"
LONGEST_NAME = 255
"""Bytes of a file's name."""


class ModelFiles:
    """Names, shapes and tensors of a model folder. Pickles (``pytorch_model.bin``) only where they are allowed.

    ``through`` may stand something in the place of each file that is opened.
    """

    def __init__(
        self, folder: Path, allow_pickle: bool = False, through: Callable[[TensorFile], TensorFile] = lambda file: file
    ) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"the model folder {folder} does not exist")
        index: dict[str, str] = {}
        names: Sequence[str] = [name for name in (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX) if _there(folder / name)]
        if not names:
            raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; is it a model folder?")
        self._index: tuple[Path, Stamp] | None = None
        if names[0] in (INDEX, PICKLE_INDEX):
            index = _index(folder / names[0])
            self._index = folder / names[0], stamp(folder / names[0])
        self.files: list[TensorFile] = [
            through(open_tensors(folder / name, allow_pickle)) for name in sorted(set(index.values())) or names[:1]
        ]
        self._where = {key: (file, key) for file in self.files for key in file.shapes}
        by_name = {file.path.name: file for file in self.files}
        for key, name in index.items():
            if key not in by_name[name].shapes:
                have = f"; {self._where[key][0].path.name} has it" if key in self._where else ""
                raise CheckpointError(
                    f"{folder / name} has no '{key}', which the index says it has{have}; "
                    "remove or restore this checkpoint"
                )
        if index:
            self._where = {key: (by_name[name], key) for key, name in index.items()}
        self.shapes = {key: file.shapes[key] for key, (file, _) in self._where.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor or some rows of it, at least fp32."""
        file, key = self._stored(name)
        return file.read(key, rows)

    def raw(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor or some rows of it as stored, unchecked."""
        file, key = self._stored(name)
        return file.raw(key, rows)

    def dtype(self, name: str) -> torch.dtype:
        """The precision a tensor is stored in."""
        file, key = self._stored(name)
        return file.dtype(key)

    def settled_by(self) -> list[Path]:
        """The files that decide the weights: the index does, where two shards hold one name."""
        index = [] if self._index is None else [self._index[0]]
        return [*index, *(path for file in self.files for path in file.settled_by())]

    def unchanged(self) -> bool:
        """Whether shards and index on disk are still those that were opened."""
        return all(file.unchanged() for file in self.files) and (self._index is None or as_stamped(*self._index))

    def _stored(self, name: str) -> tuple[TensorFile, str]:
        if name not in self._where:
            raise CheckpointError(f"{self.folder} has no parameter '{name}'")
        return self._where[name]

    def ties(self) -> bool | None:
        """Whether ``config.json`` says that head and embedding are one; None where it does not say."""
        if not _there(self.folder / MODEL_CONFIG):
            return None
        config = read_json(self.folder / MODEL_CONFIG, verify=True)
        inner = config.get("text_config")
        found = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
        return found if isinstance(found, bool) else None

    def call_one(self, head: str, embedding: str) -> None:
        """Let either name stand for the one parameter that both are; ``shapes`` then has the embedding's."""
        one = self._where.get(embedding) or self._where.get(head)
        if one is not None:
            self._where |= {head: one, embedding: one}
            self.shapes.pop(head, None)
            self.shapes[embedding] = one[0].shapes[one[1]]

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ``CheckpointError`` when a parameter is missing here or has another shape."""
        for name, shape in shapes.items():
            have = self.shapes.get(name)
            if have is None:
                raise CheckpointError(f"backbone {self.folder} has no '{name}'; it is not the model of this run")
            if tuple(have) != tuple(shape):
                raise CheckpointError(
                    f"backbone {self.folder}: '{name}' is {tuple(have)} but the run has {tuple(shape)}; "
                    "it is not the model of this run"
                )


def _there(path: Path) -> bool:
    return os.path.lexists(path)


def _index(path: Path) -> dict[str, str]:
    index = read_json(path, LARGE, verify=True).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{path} has no weight_map of names; restore the file")
    for name in set(index.values()):
        plain = Path(name).name == name and name not in ("", "..") and name.isprintable()
        if not plain or len(name.encode()) > LONGEST_NAME:
            raise CheckpointError(f"{path} points outside its folder: {name!r}; restore the file")
    return index

"""The weight files of one Hugging Face model folder, sharded or not, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from next_core.errors import CheckpointError
from next_core.sources.folders import SafetensorsFile, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ModelFiles:
    """Names, shapes and tensors of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"the model folder {folder} does not exist")
        self._index: dict[str, str] = {}
        self.files = [SafetensorsFile(folder / name) for name in self._file_names()]
        self._where = {key: file for file in self.files for key in file.shapes}
        for key, file in self._index.items():
            if key not in self._where:
                raise CheckpointError(
                    f"{folder / file} has no '{key}', which the index says it has; remove or restore this checkpoint"
                )
        self.shapes = {key: file.shapes[key] for key, file in self._where.items()}

    def _file_names(self) -> list[str]:
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        if not (self.folder / INDEX).exists():
            raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; is it a model folder?")
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map; restore the file")
        for name in index.values():
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise CheckpointError(f"{self.folder / INDEX} points outside its folder: {name!r}")
        self._index = index
        return sorted(set(index.values()))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor or some rows of it, at least fp32."""
        if name not in self._where:
            raise CheckpointError(f"{self.folder} has no parameter '{name}'")
        return self._where[name].read(name, rows)

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

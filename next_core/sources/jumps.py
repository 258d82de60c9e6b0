"""The jumps of a run folder, counted into the checkpoints before them."""

from __future__ import annotations

import copy
import itertools
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from next_core.errors import CheckpointError
from next_core.sources.checkpoint_names import MOST_STEPS
from next_core.sources.tensor_cache import TensorCache
from next_core.sources.tensor_files import SafetensorsFile, read_json
from next_core.storage.manifest import MANIFEST, check_manifest

CHECKPOINTS = "checkpoints"
JUMPS = "jumps"
JUMP_RECORD = "jump.json"
UNDONE = "undone.json"
SHIFT_FILE = "shift.safetensors"
NAME = re.compile(r"[0-9]{1,9}")
"""How the folder of a jump is called."""


class Shifts:
    """The jumps of a run folder (``jumps/`` beside ``checkpoints/``), counted into the checkpoints before them.

    A jump made after step N moves every checkpoint up to N by as much: deltas between checkpoints then show what RL
    did, and not what a jump did. A jump that lives in an adapter of its own has nothing to shift. Where a jump was
    undone some steps later, the history starts anew at ``start``.
    """

    def __init__(self, checkpoints: Path) -> None:
        # A trainer's own folder holds weights from after each jump, and brings its jump adapters along.
        self._places = jump_places(checkpoints)
        self.ours = bool(self._places)
        self.start = 0
        self._cache = TensorCache()
        self._shifts: dict[tuple[str, int], tuple[int, Shift]] = {}  # a number can be used again after a rollback

    @property
    def root(self) -> Path:
        """Where the jumps of a run folder lie; only where the folder is ``ours``."""
        return next((place for place in self._places if place.is_dir()), self._places[0])

    def refresh(self) -> None:
        """Take in jumps that were made, and forget those that were rolled back."""
        if not self.ours:
            return
        self.start = max((undone for _, _, undone in jump_records(self.root) if undone is not None), default=0)
        present = {}
        for path, record in jump_folders(self.root):
            if os.path.lexists(path / SHIFT_FILE):
                present[path.name, (path / SHIFT_FILE).stat().st_mtime_ns] = record["step"], path / SHIFT_FILE
        for key, (step, file) in present.items():
            if key not in self._shifts:
                if os.path.lexists(file.parent / MANIFEST):
                    check_manifest(file.parent)
                self._shifts[key] = step, Shift(file, self._cache)
        self._shifts = {key: self._shifts[key] for key in present}

    def as_of(self, step: int) -> Shifts:
        """Return the jumps made before a step: these very ones where none was made at or after it."""
        earlier = {key: (made, shift) for key, (made, shift) in self._shifts.items() if made < step}
        if len(earlier) == len(self._shifts):
            return self
        found = copy.copy(self)
        found._shifts = earlier
        return found

    def made_after(self, step: int) -> list[Shift]:
        """The shifts of the jumps made right after a step, undone later or not."""
        records = jump_records(self.root) if self.ours else []
        found = [path / SHIFT_FILE for path, record, _ in records if record["step"] == step]
        return [Shift(path, TensorCache()) for path in found if os.path.lexists(path)]

    def since(self, step: int) -> tuple[Shift, ...]:
        """The shifts of the jumps made at or after a step, in order."""
        return tuple(shift for jumped, shift in self._shifts.values() if step <= jumped)


_SHIFTS = itertools.count()


class Shift:
    """What one jump moved each stored tensor by, read on demand."""

    def __init__(self, path: Path, cache: TensorCache) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        self._cache = cache
        self._number = next(_SHIFTS)  # an id() comes back once its object is gone, and a folder's name after a rollback

    def unchanged(self) -> bool:
        """Whether its file is still the one that was opened."""
        return self._file.unchanged()

    def added(self, value: Tensor, key: str, rows: slice | None = None) -> Tensor:
        """A stored tensor, or some rows of one, with the jump in it; the same where the jump left it alone."""
        if key not in self._file.shapes:
            return value
        shape = self._file.shapes[key]
        if not shape or shape[1:] != tuple(value.shape[1:]) or (rows is None and shape[0] != value.shape[0]):
            raise CheckpointError(
                f"{self._file.path}: '{key}' is {shape} but the checkpoints have {tuple(value.shape)}; these are jumps "
                "of another run"
            )
        if rows is not None:
            return value + self._file.read(key, rows)
        where = key, self._number
        cached = self._cache.get(where)
        if cached is None:
            cached = (self._file.read(key),)
            self._cache.put(where, cached)
        return value + cached[0]


def jump_places(checkpoints: Path) -> list[Path]:
    """Where jumps would lie for this folder of checkpoints; empty unless it is that of a run folder.

    It may be named by ``..`` or a link, or be a link itself: both it and what it leads to are asked.
    """
    # Not by name alone: the last part is kept as it is, unless it has no name of its own.
    given = checkpoints.parent.resolve() / checkpoints.name if checkpoints.name not in ("", "..") else None
    folders = dict.fromkeys(folder for folder in (given, checkpoints.resolve()) if folder is not None)
    return [folder.parent / JUMPS for folder in folders if folder.name == CHECKPOINTS]


def jump_folders(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The jumps that stand, in order: their folders and records."""
    return [(path, record) for path, record, undone in jump_records(root) if undone is None]


def jump_records(root: Path) -> list[tuple[Path, dict[str, Any], int | None]]:
    """The folders under ``jumps/``, in order, with their records, and the step at which one was undone."""
    if not root.is_dir():
        return []
    paths = sorted(path for path in root.iterdir() if NAME.fullmatch(path.name))
    return [
        (path, _record(path / JUMP_RECORD), _undone(path / UNDONE) if os.path.lexists(path / UNDONE) else None)
        for path in paths
    ]


def _undone(path: Path) -> int:
    step: int = _record(path, verify=False)["step"]  # written when the folder was complete already
    return step


def _record(path: Path, verify: bool = True) -> dict[str, Any]:
    record = read_json(path, verify=verify)
    if type(record.get("step")) is not int or not 0 <= record["step"] <= MOST_STEPS:
        raise CheckpointError(f"{path} names no step; restore it, or remove {path.parent}")
    return record

"""The jumps of a run folder, added to the checkpoints before them."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor

from next_core.errors import damaged, other_model
from next_core.sources.checkpoint_names import LARGEST_STEP
from next_core.sources.tensor_files import SafetensorsFile, read_json
from next_core.storage.manifest import MANIFEST, check_manifest

CACHE_BYTES = 256 * 2**20  # Limit of one cache


class TensorCache:
    """The most recently used tensors, up to ``CACHE_BYTES``."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[str, int], tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int]) -> tuple[Tensor, ...] | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def drop(self, key: tuple[str, int]) -> None:
        self._bytes -= sum(tensor.nbytes for tensor in self._values.pop(key, ()))

    def put(self, key: tuple[str, int], value: tuple[Tensor, ...]) -> None:
        self.drop(key)
        self._values[key] = value
        self._bytes += sum(tensor.nbytes for tensor in value)
        while self._bytes > CACHE_BYTES:
            self.drop(next(iter(self._values)))


CHECKPOINTS = "checkpoints"
JUMPS = "jumps"
JUMP_RECORD = "jump.json"
UNDONE = "undone.json"
DELETED = "deleted.json"
"""Lies next to checkpoints of which a run has deleted some: at which step its history begins now."""
SHIFT_FILE = "shift.safetensors"
NAME = re.compile(r"[0-9]{1,9}")  # The name of a jump's folder


class Shifts:
    """What the jumps of a run folder (``jumps/`` next to ``checkpoints/``) moved the stored tensors by.

    A jump made after step N moves every checkpoint up to N by as much: deltas between checkpoints then show what RL
    did, not what a jump did. A jump in an adapter of its own shifts nothing. After a jump was undone some steps later,
    the history starts again at ``start``. Outside a run folder (``in_run_folder`` is false) there are no shifts: a
    trainer's own folder stores weights from after each jump, and its jump adapters.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._places = jump_places(checkpoints)
        self.in_run_folder = bool(self._places)
        self.start = 0
        self._cache = TensorCache()
        self._shifts: dict[tuple[str, int], tuple[int, Shift]] = {}  # by folder and time: names are reused

    @property
    def root(self) -> Path:
        """The folder of the jumps; only in a run folder."""
        return next((place for place in self._places if place.is_dir()), self._places[0])

    def refresh(self) -> None:
        """Read new jumps, and forget those that were rolled back."""
        if not self.in_run_folder:
            return
        self.start = max((undone for _, _, undone in jump_records(self.root) if undone is not None), default=0)
        present = {}
        for path, record in jump_folders(self.root):
            file = path / SHIFT_FILE
            if os.path.lexists(file):
                key = path.name, file.stat().st_mtime_ns
                if key not in self._shifts and os.path.lexists(path / MANIFEST):
                    check_manifest(path)
                present[key] = self._shifts.get(key) or (record["step"], Shift(file, self._cache))
        self._shifts = present

    def as_of(self, step: int) -> Shifts:
        """Return the jumps made before a step: these very ones where none was made at or after it."""
        earlier = {key: (made, shift) for key, (made, shift) in self._shifts.items() if made < step}
        if len(earlier) == len(self._shifts):
            return self
        found = copy.copy(self)
        found._shifts = earlier
        return found

    def made_after(self, step: int) -> list[Shift]:
        """Return the shifts of the jumps made right after a step, later undone or not."""
        records = jump_records(self.root) if self.in_run_folder else []
        paths = [path / SHIFT_FILE for path, record, _ in records if record["step"] == step]
        return [Shift(path, TensorCache()) for path in paths if os.path.lexists(path)]

    def since(self, step: int) -> tuple[Shift, ...]:
        """Return the shifts of the jumps made at or after a step, in order."""
        return tuple(shift for jumped, shift in self._shifts.values() if step <= jumped)


_NUMBERS = itertools.count()


class Shift:
    """What one jump moved each stored tensor by, read on demand."""

    def __init__(self, path: Path, cache: TensorCache) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        self._cache = cache
        self._number = next(_NUMBERS)  # its key in the cache: ids and folder names are reused

    def unchanged(self) -> bool:
        """Return whether its file is still the one that was opened."""
        return self._file.unchanged()

    def added(self, value: Tensor, key: str, rows: slice | None = None) -> Tensor:
        """Return a stored tensor, or some rows of one, plus the jump; unchanged if the jump did not move it."""
        if key not in self._file.shapes:
            return value
        shape = self._file.shapes[key]
        if not shape or shape[1:] != tuple(value.shape[1:]) or (rows is None and shape[0] != value.shape[0]):
            raise other_model(
                f"{self._file.path}: '{key}' is {shape} but the checkpoints have {tuple(value.shape)}; these are jumps "
                "of another run"
            )
        if rows is not None:
            return value + self._file.read(key, rows)
        cached = self._cache.get((key, self._number))
        if cached is None:
            cached = (self._file.read(key),)
            self._cache.put((key, self._number), cached)
        return value + cached[0]


def history_begins(checkpoints: Path) -> tuple[int, bool]:
    """Return the step before which a run deleted checkpoints, 0 for none, and whether step 0 is still right.

    Older checkpoints are there for resumes. They, and step 0, are wrong once a jump that moved them was deleted.
    """
    if not os.path.lexists(checkpoints / DELETED):
        return 0, True
    record = _record(checkpoints / DELETED)
    return int(record["step"]), record.get("start") is True


def jump_places(checkpoints: Path) -> list[Path]:
    """Return where jumps would lie for a folder of checkpoints; nothing unless it is that of a run folder.

    Both the folder as it was named and what it leads to count: it may be named by ``..``, or be a link.
    """
    named = checkpoints.parent.resolve() / checkpoints.name if checkpoints.name not in ("", "..") else None
    folders = dict.fromkeys(folder for folder in (named, checkpoints.resolve()) if folder is not None)
    return [folder.parent / JUMPS for folder in folders if folder.name == CHECKPOINTS]


def jump_folders(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the folders and records of the jumps that were not undone, in order."""
    return [(path, record) for path, record, undone in jump_records(root) if undone is None]


def jump_records(root: Path) -> list[tuple[Path, dict[str, Any], int | None]]:
    """Return each jump's folder and record, and the step at which it was undone, in order."""
    if not root.is_dir():
        return []
    return [
        (path, _record(path / JUMP_RECORD), _undone(path / UNDONE))
        for path in sorted(path for path in root.iterdir() if NAME.fullmatch(path.name))
    ]


def _undone(path: Path) -> int | None:
    # Written after the manifest, which does not list it.
    return _record(path, verify=False)["step"] if os.path.lexists(path) else None


def _record(path: Path, verify: bool = True) -> dict[str, Any]:
    record = read_json(path, verify=verify)
    if type(record.get("step")) is not int or not 0 <= record["step"] <= LARGEST_STEP:
        raise damaged(path, "names no step")
    return record

"""What the sources on disk share: their settings, and the checkpoints of one run as they are opened or left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pydantic import Field

from next_core.errors import CheckpointError
from next_core.settings import Settings
from next_core.sources.checkpoint_names import missing_steps
from next_core.sources.jumps import Shifts
from next_core.sources.layouts import Found, check_complete, find_checkpoints
from next_core.sources.metrics import read_metrics
from next_core.storage.manifest import file_digest


class DiskSourceConfig(Settings):
    """The settings of a source that reads folders."""

    path: Path = Field(description="Folder that holds the folders of the steps")
    folders: tuple[Path, ...] = Field((), description="The checkpoints' own folders, where path is only above them")
    skip_damaged: bool = Field(False, description="Go on without folders that are incomplete or damaged")
    allow_pickle: bool = Field(False, description="Read weights from .bin files too, as tensors only")
    masters: bool = Field(False, description="fp32 masters from DeepSpeed's optimizer states, which can run code")


class Checkpoint(Protocol):
    """One checkpoint that was opened."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    def unchanged(self) -> bool:
        """Whether the files that decide its weights are still those that were opened."""

    def settled_by(self) -> Iterable[Path]:
        """The files that decide its weights."""


T = TypeVar("T", bound=Checkpoint)


class RunFolder(Generic[T]):
    """The checkpoints of one run by step (``checkpoints``), and the jumps of a run folder (``shifts``)."""

    def __init__(self, config: DiskSourceConfig, open_one: Callable[[Path, int], T]) -> None:
        self.checkpoints: dict[int, T] = {}
        self.shifts = Shifts(config.path)
        self._config = config
        self._open_one = open_one
        self._found = Found({})
        self._left_out: dict[int, str] = {}
        self._metrics: dict[int, dict[str, float]] | None = None

    def refresh(self, check: Callable[[Mapping[int, T]], None]) -> set[int]:
        """Take in what was written since. Returns the steps that are gone, or whose files were replaced.

        ``check`` is given all checkpoints and raises when they do not belong together; nothing has changed then.
        Raises ``CheckpointError`` for a damaged folder, unless these are skipped and others are left.
        """
        found = find_checkpoints(self._config.path, self._config.folders)
        opened: dict[int, T] = {}
        left_out: dict[int, str] = {}
        for step, folder in found.folders.items():
            before = self.checkpoints.get(step)
            if before is not None and before.folder == folder and before.unchanged():
                opened[step] = before
                continue
            try:
                check_complete(folder, contents=self._config.skip_damaged)
                opened[step] = self._open_one(folder, step)
            except CheckpointError as error:
                if not self._config.skip_damaged:
                    raise
                left_out[step] = f"left out {folder}, step {step}: {error}"
        if left_out and not any(opened):  # step 0 alone is no observation
            raise CheckpointError(f"every checkpoint under {self._config.path} is damaged; {min(left_out.items())[1]}")
        check(opened)
        stale = {step for step, before in self.checkpoints.items() if opened.get(step) is not before}
        self.checkpoints, self._found, self._left_out = opened, found, left_out
        self.shifts.refresh()
        self._metrics = None
        return stale

    @property
    def naming(self) -> str:
        """How the folders are named, N for the step."""
        return self._found.naming

    def notes(self) -> list[str]:
        """What a user should know of the folders."""
        missing = missing_steps(tuple(self._found.folders), self._left_out)
        what = f"step {missing[0]} seems" if len(missing) == 1 else f"steps {', '.join(map(str, missing))} seem"
        return [*self._found.notes, *self._left_out.values(), *([f"{what} to be missing"] if missing else [])]

    def digest(self, checkpoint: T | str, step: int) -> str | None:
        """A digest of a checkpoint's weights (or of a word, where there are none) and of the jumps since its step.

        None where a file has changed since it was opened: what was read of it is not what now lies there.
        """
        shifts = self.shifts.since(step)
        files: Sequence[Path] = [shift.path for shift in shifts]

        def as_opened() -> bool:
            known = isinstance(checkpoint, str) or checkpoint.unchanged()
            return known and all(shift.unchanged() for shift in shifts)

        if not as_opened():
            return None
        if isinstance(checkpoint, str):
            found = _digest([checkpoint], files)
        else:
            found = _digest([], [*sorted(checkpoint.settled_by()), *files])
        return found if as_opened() else None  # nor may one be replaced while it is hashed

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        """Return everything the trainer logged, by step."""
        if self._metrics is None:
            self._metrics = read_metrics({step: checkpoint.folder for step, checkpoint in self.checkpoints.items()})
        return self._metrics


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for part in (*words, *(f"{path.name} {file_digest(path)}" for path in files)):
        whole.update(f"{part}\n".encode())
    return whole.hexdigest()

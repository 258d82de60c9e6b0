"""The base of the sources that read folders: their settings, and the checkpoints of one run by step."""

import difflib
import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import Field

from next_core.errors import CheckpointError, no_history, not_found, other_model
from next_core.interfaces import CheckpointSource
from next_core.settings import Settings
from next_core.sources.checkpoint_names import missing_steps
from next_core.sources.jumps import Shift, Shifts, history_begins
from next_core.sources.layouts import CheckpointFolders, check_complete, contains_checkpoints, find_checkpoints
from next_core.sources.matrices import other_vocabulary
from next_core.sources.metrics import check_one_run, read_metrics
from next_core.storage.manifest import file_digest

MOST = 1000  # Limit of names that are compared with one, and of characters of each: this is quadratic

Shapes = Mapping[str, tuple[int, ...]]


def check_same_shapes(ours: Shapes, theirs: Shapes, folder: Path, first: str) -> None:
    """Raise ``CheckpointError`` if ``theirs``, in ``folder``, differ from the shapes of the checkpoint ``first``."""
    missing, new = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    other = next((name for name, shape in ours.items() if theirs.get(name, shape) != shape), None)
    if missing and new:
        fitting = [name[:MOST] for name in new[:MOST] if theirs[name] == ours[missing[0]]] or new
        likeliest = difflib.get_close_matches(missing[0][:MOST], fitting, n=1, cutoff=0)[0]
        problem = (
            f"'{missing[0]}' of {first} is missing and '{likeliest}' is new (of {len(missing)} missing, {len(new)} "
            "new); did training rename its parameters? Extrapolate only checkpoints with the same names"
        )
    elif missing:
        problem = f"'{missing[0]}' is missing, which {first} has ({len(missing)} in all); restore this checkpoint"
    elif new:
        problem = f"'{new[0]}' is new, {first} does not have it ({len(new)} in all); are these checkpoints of one run?"
    elif other is not None:
        why = "these are checkpoints of different runs"
        if other_vocabulary(other, theirs[other], ours[other]):
            why = "the vocabulary was resized between them: extrapolate those before or after alone"
        problem = f"'{other}' is {theirs[other]} but {ours[other]} in {first}; {why}"
    else:
        return
    raise other_model(f"{folder}: {problem}")


FRESH_ADAPTER = "lora-zero"  # Stands in a digest for the adapter that RL began with, if step 0 was not kept


class DiskSourceConfig(Settings):
    """The settings of a source that reads folders."""

    path: Path = Field(description="Folder that contains the folders of the steps")
    folders: tuple[Path, ...] = Field((), description="The checkpoints' own folders, where path only contains them")
    start: Path | None = Field(None, description="The adapter or model that RL began from, instead of a checkpoint-0")
    skip_damaged: bool = Field(False, description="Skip folders that are incomplete or damaged")
    allow_pickle: bool = Field(False, description="Read weights from pickles too, as tensors only")
    masters: bool = Field(False, description="fp32 masters from DeepSpeed's optimizer states, which can run code")


class Checkpoint(Protocol):
    """One checkpoint that was opened."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    def unchanged(self) -> bool:
        """Return whether the files that determine its weights are still those that were opened."""

    def weight_files(self) -> Iterable[Path]:
        """Return the files that determine its weights."""


T = TypeVar("T", bound=Checkpoint)
V = TypeVar("V")


class FolderSource(CheckpointSource, Generic[T]):
    """A source that reads the checkpoints of one run from folders."""

    FILES: ClassVar[tuple[str, ...]]
    """Files of which a checkpoint of this layout contains one."""

    def __init__(self, config: DiskSourceConfig) -> None:
        super().__init__(config)
        self._checkpoints: dict[int, T] = {}
        self._shifts, self._begins, self._start_is_right = Shifts(config.path), 0, True
        self._folders = CheckpointFolders({})
        self._skipped_folders: dict[int, str] = {}
        self._metrics: dict[int, dict[str, float]] | None = None

    @classmethod
    def detect(cls, path: Path, folders: Sequence[Path] = ()) -> bool:
        return contains_checkpoints(path, cls.FILES, folders)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.config,)  # another process opens the folder for itself

    @abstractmethod
    def _open(self, folder: Path, step: int) -> T:
        """Open one checkpoint. Raises ``CheckpointError`` for a damaged one."""

    @abstractmethod
    def _check(self, checkpoints: Mapping[int, T]) -> None:
        """Raise ``CheckpointError`` unless all checkpoints belong to one run, and to its backbone."""

    def refresh(self) -> set[int]:
        """Read checkpoints that were written meanwhile. Return the steps that are gone, or whose files were replaced.

        Raises ``CheckpointError`` for a damaged folder, unless these are skipped and others are left, and for
        checkpoints that do not belong together; the source is then unchanged.
        """
        found = find_checkpoints(self.config.path, self.config.folders)
        if self.config.start is not None:
            found = found.starting_at(self.config.start)
        opened: dict[int, T] = {}
        skipped: dict[int, str] = {}
        for step, folder in found.folders.items():
            before = self._checkpoints.get(step)
            if before is not None and before.folder == folder and before.unchanged():
                opened[step] = before
                continue
            try:
                check_complete(folder, contents=self.config.skip_damaged)
                opened[step] = self._open(folder, step)
            except CheckpointError as error:
                if not self.config.skip_damaged:
                    raise _with_remedy(error, newest=step == max(found.folders)) from error
                skipped[step] = f"skipped {folder}, step {step}: {error.message}"
        if skipped and not any(opened):  # step 0 alone is not an observation
            raise CheckpointError(
                f"every checkpoint under {self.config.path} is damaged: {skipped[min(skipped)]}",
                kind="checkpoint-damaged",
            )
        self._check(opened)
        if not self.config.folders:
            new = [step for step, checkpoint in opened.items() if self._checkpoints.get(step) is not checkpoint]
            # Step 0 may be a copy of what another training, such as SFT, ended with.
            check_one_run({step: each.folder for step, each in opened.items() if step > 0}, new)
        stale = {step for step, before in self._checkpoints.items() if opened.get(step) is not before}
        self._checkpoints, self._folders, self._skipped_folders = opened, found, skipped
        self._begins, self._start_is_right = history_begins(self.config.path)
        self._shifts.refresh()
        self._metrics = None
        return stale

    @property
    def naming(self) -> str:
        return self._folders.naming

    @property
    def notes(self) -> Sequence[str]:
        there = [step for step in self._own(self._folders.folders) if step >= self._begins]
        missing = missing_steps(there, self._skipped_folders)
        what = f"step {missing[0]} seems" if len(missing) == 1 else f"steps {', '.join(map(str, missing))} seem"
        gap = [f"{what} to be missing"] if missing else []
        deleted = [f"{self._deleted()}; nothing is known of the motion before it"] if self._begins else []
        return [*self._folders.notes, *self._skipped_folders.values(), *gap, *deleted]

    @property
    def begins(self) -> int:
        return self._begins

    def _deleted(self) -> str:
        return f"the run deleted its checkpoints before step {self._begins} (keep: needed)"

    def _step_0(self) -> T | None:
        """Return the checkpoint of step 0, if any. Raises ``CheckpointError`` if a jump after it was deleted."""
        if not self._start_is_right:
            raise no_history(
                f"{self.config.path}: {self._deleted()}, so deltas since RL began are not known; use a predictor that "
                "reads recent checkpoints only, such as secant, or train with keep: all"
            )
        return self._checkpoints.get(0)

    @property
    def steps(self) -> tuple[int, ...]:
        # Step 0, if it was kept, is where RL began and not an observation of it.
        return tuple(step for step in self._checkpoints if step > 0 and step >= max(self._shifts.start, self._begins))

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        if self._metrics is None:
            self._metrics = read_metrics({step: c.folder for step, c in self._own(self._checkpoints).items()})
        return self._metrics

    def _own(self, by_step: Mapping[int, V]) -> dict[int, V]:
        """Return what belongs to the run: not the start that was named, which another training may have logged."""
        return {step: value for step, value in by_step.items() if step > 0 or self.config.start is None}

    def _newest(self) -> T | None:
        return next(reversed(self._checkpoints.values()), None)

    def _checkpoint(self, step: int) -> T:
        if step not in self._checkpoints:
            raise not_found(f"{self.config.path} has no step {step}; observed steps: {self.steps}")
        return self._checkpoints[step]

    def _digest(self, checkpoint: T | None, step: int) -> str | None:
        """Return a digest of a checkpoint's weights (None: a fresh adapter, B = 0) and of the jumps since a step.

        None if a file has changed since it was opened: what was read is then not what lies on disk.
        """
        shifts = self._shifts.since(step)
        opened: list[T | Shift] = [*shifts] if checkpoint is None else [checkpoint, *shifts]
        if not all(each.unchanged() for each in opened):
            return None
        files = [] if checkpoint is None else sorted(checkpoint.weight_files())
        files += [shift.path for shift in shifts]
        lines = [FRESH_ADAPTER] if checkpoint is None else []
        lines += [f"{path.name} {file_digest(path)}" for path in files]
        digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
        # Nor may a file have been replaced while it was hashed.
        return digest if all(each.unchanged() for each in opened) else None


def _with_remedy(error: CheckpointError, newest: bool) -> CheckpointError:
    """Return the error of a folder that lacks something, with what helps if its trainer has not finished it."""
    if error.kind not in ("checkpoint-incomplete", "checkpoint-damaged", "checkpoint-not-found"):
        return error
    wait = "this newest checkpoint may still be being written: wait, or " if newest else ""
    return CheckpointError(f"{error.message}; {wait}pass --skip-damaged (skip_damaged=True)", kind=error.kind)

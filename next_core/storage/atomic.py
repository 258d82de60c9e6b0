"""Atomic writes: a reader sees the old state or the new one, never a half. Nothing else in the project renames."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from next_core.errors import ConfigError, StorageError
from next_core.storage.manifest import INCOMPLETE, MANIFEST, manifest_text

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NUMBERED = r"\.(tmp|old)-(\d+)"


def failpoint(what: str, path: Path) -> None:
    """Called before and after every write, rename and removal: a test puts something here that ends the process."""


@contextlib.contextmanager
def doing(what: str, path: Path) -> Iterator[None]:
    """One step of ours on the disk. Raises ``StorageError`` with the remedy in place of ``OSError``."""
    failpoint(f"before {what}", path)
    try:
        yield
    except OSError as error:
        raise storage_error(f"{what} {path}", error) from error
    failpoint(f"after {what}", path)


def storage_error(doing: str, error: OSError) -> StorageError:
    """What the disk refused, as an error that names the remedy."""
    if error.errno in FULL:
        reason = "the disk is full; free some space, and run the same command again"
    elif error.errno in FORBIDDEN:
        reason = f"it may not be written ({error.strerror}); choose another folder, or give yourself the right to"
    else:
        reason = str(error.strerror or error)
    made = StorageError(f"{doing}: {reason}")
    made.errno = error.errno
    return made


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of a full disk; some libraries keep no more of it than the words."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(
    target: Path, overwrite: bool = False, digests: Mapping[str, str] | None = None, manifest: bool = True
) -> Iterator[Path]:
    """A temporary sibling of ``target`` to write into; on success it becomes ``target``, else it is gone.

    A manifest is written last, unless the folder is one that grows. ``digests`` may name the sha256 of files by their
    path in the folder, filled in while they are written: those are not read again. Raises ``ConfigError`` if ``target``
    exists and ``overwrite`` is false, ``StorageError`` for what the disk refuses, and whatever the body raises.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already; choose another folder or remove it")
    scratch = _sibling(target, "tmp")
    with doing("making a folder", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep_siblings(target)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    try:
        yield scratch
        if manifest:
            seal(scratch, digests)
        with doing("renaming a folder", target):
            if not target.exists():
                scratch.rename(target)
            elif not _exchange(scratch, target):
                _replace(scratch, target)
            _fsync(target.parent)
        shutil.rmtree(scratch, ignore_errors=True)  # what was exchanged
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{os.getpid()}"


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, rename_exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0)


def _replace(scratch: Path, target: Path) -> None:
    """The same in two steps: a process killed between them leaves the old one aside, and ``recover`` puts it back."""
    old = _sibling(target, "old")
    target.rename(old)
    failpoint("between two renames", target)
    try:
        scratch.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def seal(folder: Path, digests: Mapping[str, str] | None = None) -> None:
    """Make all files of a folder durable, and then its manifest, which says that it is complete.

    ``digests`` as for ``new_directory``. A folder that somebody else has written is sealed so as well.
    """
    with doing("writing", folder / MANIFEST):
        sweep_siblings(folder / MANIFEST)  # of a killed process: it must not be listed
        for path in (path for path in sorted(folder.rglob("*")) if path.exists()):
            _fsync(path)
    write_text(folder / MANIFEST, manifest_text(folder, digests))


@contextlib.contextmanager
def changing_in_place(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Marks a folder as ``INCOMPLETE`` while the body replaces its files; after an error the mark stays.

    ``facts`` are written into the mark. The old manifest goes first, for it no longer holds.
    """
    write_text(folder / INCOMPLETE, json.dumps(dict(facts), indent=1))
    with doing("removing", folder / MANIFEST):
        (folder / MANIFEST).unlink(missing_ok=True)
    yield
    with doing("removing", folder / INCOMPLETE):
        (folder / INCOMPLETE).unlink()
        _fsync(folder)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest one above it that exists."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextlib.contextmanager
def enough_space(target: Path, needed: int) -> Iterator[None]:
    """Refuse to begin what the disk has no room for, and name the file when it fills up all the same.

    Raises ``StorageError`` with the bytes needed and the bytes free, before the body or in place of its ``OSError``.
    """
    free = free_bytes(target)
    if free < needed:
        raise StorageError(
            f"{target} needs {_megabytes(needed)} but the disk has {_megabytes(free)} free; nothing was written: free "
            "some space, or choose a folder on another disk"
        )
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = Path(error.filename).name if isinstance(error.filename, str) else "a file"
        raise StorageError(
            f"the disk was full while {where} of {target} was written; {_megabytes(needed)} were needed and "
            f"{_megabytes(free)} free at the start: free some space, or choose a folder on another disk"
        ) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def fresh_directory(target: Path, commit: str) -> Iterator[None]:
    """An empty ``target``; what was there is put back when the body fails, and removed when it succeeds.

    ``commit`` is a file that the body writes: once it is there, a killed process leaves the new folder and not the old
    one (``recover``).
    """
    aside = _sibling(target, "old")
    recover(target, commit)
    with doing("making a folder", target):
        if target.exists():
            target.rename(aside)
            failpoint("between two renames", target)
        target.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(target)
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path, commit: str) -> None:
    """After a process was killed in ``fresh_directory``: the new folder if it was committed, else the old one."""
    for kind, path in _left_behind(target):
        if kind == "old" and not (target / commit).exists():
            with doing("putting back", target):
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def move_directory(source: Path, target: Path) -> None:
    """Give a folder another name on the same disk, durably."""
    with doing("renaming a folder", target):
        source.rename(target)
        _fsync(target.parent)


def remove_directory(folder: Path) -> None:
    """Remove a folder so that a crash leaves all of it, or nothing by its name."""
    if folder.exists():
        doomed = _sibling(folder, "tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        with doing("removing", folder):
            folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed in ``folder``; put back what they put aside."""
    targets = {match[1] for path in _hidden(folder) if (match := re.fullmatch(rf"\.(.+){_NUMBERED}", path.name))}
    for name in targets:
        sweep_siblings(folder / name)


def sweep_siblings(target: Path) -> None:
    """The same beside one ``target``, and nothing else.

    Only a process of this machine is known to be dead: one target is not to be written from two machines at once.
    """
    for kind, path in _left_behind(target):
        if kind == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _left_behind(target: Path) -> Iterator[tuple[str, Path]]:
    """What dead processes, and this one, left beside a target: ``tmp`` is a half, ``old`` what was put aside."""
    numbered = re.compile(rf"\.{re.escape(target.name)}{_NUMBERED}")
    for path in _hidden(target.parent):
        match = numbered.fullmatch(path.name)
        if match is not None and (int(match[2]) == os.getpid() or not is_alive(int(match[2]))):
            yield match[1], path


def _hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*")) if folder.is_dir() else []


def is_alive(process: int) -> bool:
    """Whether a process of this machine is alive, as far as can be told."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, or no number of a process
    return True


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write; on success it replaces ``path``, durably, else it is gone."""
    scratch = _sibling(path, "tmp")
    sweep_siblings(path)
    try:
        yield scratch
        with doing("writing", path):
            _fsync(scratch)
            failpoint("before renaming", path)
            scratch.replace(path)
            _fsync(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Replace one file atomically; ``errors`` as ``str.encode`` has it, for text that was read with the same."""
    with atomic_file(path) as scratch, doing("writing", path):
        scratch.write_text(text, encoding="utf-8", errors=errors)

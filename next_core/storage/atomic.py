"""Atomic writes: a reader sees the old state or the new one, never a part of either. No other module renames."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from next_core.errors import ConfigError, StorageError, describe
from next_core.storage.manifest import MANIFEST, manifest_text

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NUMBERED = r"\.(tmp|old)-(\d+)"
"""Suffix of a temporary sibling: a half-written file or folder, or one moved aside, and the process that did it."""


def failpoint(what: str, path: Path) -> None:
    """Do nothing; called around every write, rename and removal so that tests can stop the process there."""


@contextlib.contextmanager
def disk_operation(what: str, path: Path) -> Iterator[None]:
    """Run one operation on the disk; an error of it becomes a ``StorageError`` that names the path and the remedy."""
    failpoint(f"before {what}", path)
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise storage_error(f"{what} {path}", error) from error
    failpoint(f"after {what}", path)


def storage_error(operation: str, error: Exception) -> StorageError:
    """Return the ``StorageError`` for a disk operation that failed."""
    number = error_number(error)
    if number in FULL:
        reason = "the disk is full; free some space, then try again"
        converted = StorageError(f"{operation}: {reason}", kind="storage-full")
    elif number in FORBIDDEN:
        reason = f"it is not writable ({os.strerror(number)}); change its permissions, or choose another folder"
        converted = StorageError(f"{operation}: {reason}", kind="storage-not-writable")
    else:
        converted = StorageError(
            f"{operation}: {getattr(error, 'strerror', None) or describe(error)}", kind="storage-failed"
        )
    converted.errno = number
    return converted


def error_number(error: BaseException) -> int | None:
    """Return the operating system's number of an error; safetensors keeps it in the text of its own."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else getattr(error, "errno", None)


def is_full(error: BaseException | None) -> bool:
    """Return whether a full disk caused an error; some libraries keep only the text of the original one."""
    while error is not None:
        if error_number(error) in FULL or "No space left on device" in str(error):
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
    """Yield a temporary sibling of ``target`` to write into; it becomes ``target`` on success and is removed otherwise.

    A manifest is written last, unless ``manifest`` is false because the folder will grow. ``digests`` maps paths in the
    folder to their digests (``manifest.digest_of``); the body may fill it while it writes, and those files are not read
    again. Raises ``ConfigError`` if ``target`` exists and ``overwrite`` is false, ``StorageError`` if the disk refuses,
    and whatever the body raises.
    """
    if target.exists() and not overwrite:
        raise ConfigError(
            f"{target} exists already; choose another folder or remove it", kind="config-folder-not-empty"
        )
    scratch = _sibling(target, "tmp")
    with disk_operation("making a folder", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep_siblings(target)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    try:
        yield scratch
        if manifest:
            seal(scratch, digests)
        with disk_operation("renaming a folder", target):
            if not target.exists():
                scratch.rename(target)
            elif not _exchange(scratch, target):
                _replace(scratch, target)
            _fsync(target.parent)
        shutil.rmtree(scratch, ignore_errors=True)  # the old folder, if they were exchanged
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{os.getpid()}"


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one system call; return False where the system or the file system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, rename_exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0)


def _replace(scratch: Path, target: Path) -> None:
    """Replace a folder by two renames. After a kill between them, ``sweep_siblings`` puts the old folder back."""
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
    """Flush all files of a folder to disk, then write its manifest, which marks it as complete.

    ``digests`` is as for ``new_directory``. Folders that other programs wrote can be sealed too.
    """
    with disk_operation("writing", folder / MANIFEST):
        sweep_siblings(folder / MANIFEST)  # a killed process may have left one, which must not be listed
        for path in (path for path in sorted(folder.rglob("*")) if path.exists()):
            _fsync(path)
    write_text(folder / MANIFEST, manifest_text(folder, digests))


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_can_be_folder(path: Path) -> None:
    """Raise ``ConfigError`` if ``path`` is a file or lies in one."""
    path = path.absolute()
    there = next(above for above in (path, *path.parents) if above.exists())
    if not there.is_dir():
        reason = "" if there == path else f", so {path} cannot be made"
        raise ConfigError(f"{there} is a file{reason}; choose another folder", kind="config-folder-not-empty")


@contextlib.contextmanager
def enough_space(target: Path, needed: int) -> Iterator[None]:
    """Check that ``needed`` bytes fit before the body writes ``target``.

    Raises ``StorageError`` with the bytes needed and free: before the body, or in place of its ``OSError`` if the disk
    fills up meanwhile.
    """
    free = free_bytes(target)
    if free < needed:
        raise StorageError(
            f"{target} needs {_megabytes(needed)} but the disk has {_megabytes(free)} free; nothing was written: free "
            "some space, or choose a folder on another disk",
            kind="storage-full",
        )
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        name = Path(error.filename).name if isinstance(error.filename, str) else "a file"
        raise StorageError(
            f"the disk filled up while {name} of {target} was written; {_megabytes(needed)} were needed and "
            f"{_megabytes(free)} free at the start: free some space, or choose a folder on another disk",
            kind="storage-full",
        ) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def fresh_directory(target: Path, commit: str) -> Iterator[None]:
    """Make an empty ``target``; an existing one is put back if the body fails, and removed if it succeeds.

    ``commit`` is a file that the body writes: if the process is killed, ``recover`` keeps the new folder if that file
    exists, else the old one.
    """
    aside = _sibling(target, "old")
    recover(target, commit)
    try:
        with disk_operation("making a folder", target):
            if target.exists():
                target.rename(aside)
                failpoint("between two renames", target)
            target.mkdir(parents=True)
        yield
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path, commit: str) -> None:
    """Clean up after a process was killed in ``fresh_directory``."""
    for kind, path in _leftovers(target):
        if kind == "old" and not (target / commit).exists():
            with disk_operation("putting back", target):
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def move_directory(source: Path, target: Path) -> None:
    """Rename a folder on the same disk, durably."""
    with disk_operation("renaming a folder", target):
        source.rename(target)
        _fsync(target.parent)


def remove_directory(folder: Path) -> None:
    """Remove a folder; after a crash it is whole, or gone under its name."""
    if folder.exists():
        scratch = _sibling(folder, "tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        with disk_operation("removing", folder):
            folder.rename(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed in a folder; put back what they moved aside."""
    targets = {match[1] for path in _hidden(folder) if (match := re.fullmatch(rf"\.(.+){_NUMBERED}", path.name))}
    for name in targets:
        sweep_siblings(folder / name)


def sweep_siblings(target: Path) -> None:
    """Sweep the temporary siblings of one ``target`` only.

    Only processes of this machine are known to be dead, so two machines must not write one target at the same time.
    """
    for kind, path in _leftovers(target):
        if kind == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _leftovers(target: Path) -> Iterator[tuple[str, Path]]:
    """Yield the temporary siblings that dead processes, or this one, left: their kind (tmp, old) and path."""
    numbered = re.compile(rf"\.{re.escape(target.name)}{_NUMBERED}")
    for path in _hidden(target.parent):
        match = numbered.fullmatch(path.name)
        if match is not None and (int(match[2]) == os.getpid() or not is_alive(int(match[2]))):
            yield match[1], path


def _hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*")) if folder.is_dir() else []


def is_alive(process: int) -> bool:
    """Return whether a process of this machine may be alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's process, or not a valid process number
    return True


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write; it replaces ``path`` on success and is removed otherwise."""
    scratch = _sibling(path, "tmp")
    sweep_siblings(path)
    try:
        yield scratch
        with disk_operation("writing", path):
            _fsync(scratch)
            failpoint("before renaming", path)
            scratch.replace(path)
            _fsync(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Replace a text file atomically; ``errors`` is that of ``str.encode``."""
    with atomic_file(path) as scratch, disk_operation("writing", path):
        scratch.write_text(text, encoding="utf-8", errors=errors)

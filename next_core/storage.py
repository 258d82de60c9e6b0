"""Atomic writes: a reader sees the old state or the new one, never a half. Nothing else in the project renames."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError, ConfigError, NextCoreError

MANIFEST = "manifest.json"
INCOMPLETE = "INCOMPLETE.json"
"""Lies in a folder while its files are replaced one by one: what is there is partly old and partly new."""
TEMPORARY = re.compile(r"\.(tmp|old)-\d+$")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_directory(target: Path, overwrite: bool = False, digests: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A temporary sibling of ``target`` to write into; on success it becomes ``target``, else it is gone.

    A manifest (sha256 and size of every file) is written last. ``digests`` may name the sha256 of files by their path
    in the folder, filled in while they are written: those are not read again. Raises ``ConfigError`` if ``target``
    exists and ``overwrite`` is false, and whatever the body raises.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already; choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_siblings(target)
    scratch = target.parent / f".{target.name}.tmp-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        (scratch / MANIFEST).write_text(manifest_text(scratch, digests))
        for path in [*(path for path in sorted(scratch.rglob("*")) if path.is_file()), scratch]:
            _fsync(path)
        if target.exists():
            old = target.parent / f".{target.name}.old-{os.getpid()}"
            target.rename(old)
            try:
                scratch.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.rename(target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def manifest_text(folder: Path, digests: Mapping[str, str] | None = None) -> str:
    """The manifest of a folder as it is; ``digests`` as for ``new_directory``."""
    # A copied folder may bring its old manifest, which is replaced by this one.
    files = (
        path for path in folder.rglob("*") if path.is_file() and path not in (folder / MANIFEST, folder / INCOMPLETE)
    )
    manifest = {}
    for path in sorted(files):
        name = str(path.relative_to(folder))
        digest = (digests or {}).get(name) or sha256(path)
        manifest[name] = {"sha256": digest, "size": path.stat().st_size}
    return json.dumps({"files": manifest}, indent=1)


@contextlib.contextmanager
def changing_in_place(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Marks a folder as ``INCOMPLETE`` while the body replaces its files; after an error the mark stays.

    ``facts`` are written into the mark. The old manifest goes first, for it no longer holds.
    """
    write_text(folder / INCOMPLETE, json.dumps(dict(facts), indent=1))
    (folder / MANIFEST).unlink(missing_ok=True)
    yield
    (folder / INCOMPLETE).unlink()
    _fsync(folder)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest one above it that exists."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextlib.contextmanager
def enough_space(target: Path, needed: int) -> Iterator[None]:
    """Refuse to begin what the disk has no room for, and name the file when it fills up all the same.

    Raises ``NextCoreError`` with the bytes needed and the bytes free, before the body or in place of its ``OSError``.
    """
    free = free_bytes(target)
    if free < needed:
        raise NextCoreError(
            f"{target} needs {_megabytes(needed)} but the disk has {_megabytes(free)} free; nothing was written: free "
            "some space, or choose a folder on another disk"
        )
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = Path(error.filename).name if isinstance(error.filename, str) else "a file"
        raise NextCoreError(
            f"the disk was full while {where} of {target} was written; {_megabytes(needed)} were needed and "
            f"{_megabytes(free)} free at the start: free some space, or choose a folder on another disk"
        ) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def fresh_directory(target: Path) -> Iterator[None]:
    """An empty ``target``; what was there is put back when the body fails, and removed when it succeeds."""
    aside = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(aside)
    target.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(target)
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_directory(folder: Path) -> None:
    """Remove a folder so that a crash leaves all of it, or nothing by its name."""
    if folder.exists():
        doomed = folder.parent / f".{folder.name}.old-{os.getpid()}"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed in ``folder``."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if TEMPORARY.search(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sweep_siblings(target: Path) -> None:
    """Remove what killed processes left half-written beside ``target`` on its way there, and nothing else.

    Only a process of this machine is known to be dead: one target is not to be written from two machines at once.
    What was put aside (``.old-PID``) stays, as it may be the only copy.
    """
    temporary = re.compile(rf"\.{re.escape(target.name)}\.tmp-(\d+)")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        match = temporary.fullmatch(path.name)
        if match is not None and not is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether a process of this machine is alive, as far as can be told."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, or no number of a process
    return True


def check_manifest(folder: Path) -> None:
    """Raise ``CheckpointError`` when a file of ``folder`` is missing or has another size than its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["size"]:
                raise CheckpointError(f"{path} is missing or truncated ({facts['size']} bytes expected); restore it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read ({error}); the checkpoint is incomplete: remove or restore it"
        ) from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write; on success it replaces ``path``, durably, else it is gone."""
    scratch = path.parent / f".{path.name}.tmp-{os.getpid()}"
    scratch.unlink(missing_ok=True)  # of a killed process with this number
    try:
        yield scratch
        _fsync(scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Replace one file atomically; ``errors`` as ``str.encode`` has it, for text that was read with the same."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors=errors)


def json_text(value: Any) -> str:
    """One line of strict JSON: NaN and Inf, which JSON does not have, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line and make it durable. A torn last line, of a killed process, is cut off."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json_text(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())

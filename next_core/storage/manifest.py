"""What a complete folder says of itself: sha256 and size of every file, precision and shape of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from next_core.errors import CheckpointError
from next_core.storage.reading import LARGE, parse_checked, parse_json, read_bytes, with_checksum
from next_core.storage.safetensors_header import read_header

MANIFEST = "manifest.json"
INCOMPLETE = "INCOMPLETE.json"
"""Lies in a folder while its files are replaced one by one: what is there is partly old and partly new."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_text(folder: Path, digests: Mapping[str, str] | None = None) -> str:
    """The manifest of a folder as it is; ``digests`` may name the sha256 of files, which are then not read again."""
    # A copied folder may bring its old manifest, which is replaced by this one.
    ours = (folder / MANIFEST, folder / INCOMPLETE)
    manifest = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours):
        name = path.relative_to(folder).as_posix()
        digest = (digests or {}).get(name) or sha256(path)
        manifest[name] = {"sha256": digest, "size": path.stat().st_size} | _tensors(path)
    return with_checksum(json.dumps({"files": manifest}, indent=1)).decode()


def _tensors(path: Path) -> dict[str, Any]:
    """Precision and shape of each tensor of a safetensors file; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        entries = read_header(path)
    except ValueError:
        return {}  # whoever opens this file will report it
    return {"tensors": {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in entries.items()}}


def check_manifest(folder: Path, contents: bool = False) -> None:
    """Raise ``CheckpointError`` when a file of ``folder`` is not there, or not as long as its manifest says.

    Nor may the header of a safetensors file be another one. With ``contents`` every file is read, and its sha256
    compared as well.
    """
    for name, facts in _files(folder / MANIFEST).items():
        path = folder / name
        _check_size(path, facts)
        if "tensors" in facts and _tensors(path).get("tensors") != facts["tensors"]:
            raise _damaged(path, "its header")
        if contents:
            _check_digest(path, facts)


def check_contents(path: Path) -> None:
    """Raise ``CheckpointError`` when the bytes of a file are not those that its folder's manifest was made of.

    The manifest is that of its folder, or of the one above. Without one nothing is known; a file that its manifest
    does not list is foreign. What was read is remembered in this process until the file changes.
    """
    for folder in (path.parent, path.parent.parent):
        manifest = folder / MANIFEST
        if os.path.lexists(manifest) and (folder == path.parent or not _is_foreign(manifest)):
            facts = _files(manifest).get(path.relative_to(folder).as_posix())
            if facts is None:
                raise CheckpointError(f"{path} is not listed in {manifest}; somebody else put it there: remove it")
            _check_size(path, facts)
            _check_digest(path, facts)
            return


def _is_foreign(manifest: Path) -> bool:
    """Whether a file of this name, above a folder of checkpoints, is JSON of another kind: no damage of ours."""
    try:
        found = parse_json(read_bytes(manifest, LARGE), finite=False)
    except (OSError, ValueError):
        return False
    return not isinstance(found, dict) or "files" not in found


def _check_size(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        known = path.is_file() and path.stat().st_size == facts["size"]
    except OSError:  # a name that is too long for a file
        known = False
    if not known:
        raise CheckpointError(f"{path} is missing or truncated ({facts['size']} bytes expected); restore it")


def _check_digest(path: Path, facts: Mapping[str, Any]) -> None:
    if file_digest(path) != facts["sha256"]:
        raise _damaged(path, "its sha256")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what} is not what {MANIFEST} says; remove or restore this checkpoint")


_DIGESTS: dict[tuple[Path, int, int, int], str] = {}
_MANIFESTS: dict[tuple[Path, int, int, int], dict[str, dict[str, Any]]] = {}
_MOST_MANIFESTS = 16
_SETTLED = 2 * 10**9
"""Nanoseconds. Clocks of file systems are coarse: what was written just now could be written again at the same time."""

V = TypeVar("V")


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, remembered while its size, time and inode stay the same."""
    return _remembered(_DIGESTS, path, sha256)


def _remembered(known: dict[tuple[Path, int, int, int], V], path: Path, read: Callable[[Path], V]) -> V:
    """What was read of a file, as long as it is the same one. Raises ``CheckpointError`` where it cannot be read."""
    try:
        facts = path.stat()
        key = path.absolute(), facts.st_size, facts.st_mtime_ns, facts.st_ino
        found = known.get(key)
        if found is None:
            found = read(path)
            if time.time_ns() - facts.st_mtime_ns > _SETTLED:
                known[key] = found
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); restore it") from None
    return found


def _files(manifest: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file. Raises ``CheckpointError`` for a damaged one, and names that lead out."""
    if len(_MANIFESTS) > _MOST_MANIFESTS:
        _MANIFESTS.clear()
    if not os.path.lexists(manifest):
        raise _incomplete(manifest, "it is not there")
    return _remembered(_MANIFESTS, manifest, _read_files)


def _read_files(manifest: Path) -> dict[str, dict[str, Any]]:
    try:
        files = parse_checked(read_bytes(manifest, LARGE)).get("files")
        if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
            raise ValueError("it does not name files with their sha256 and size")  # noqa: TRY301 - told below
    except (OSError, ValueError) as error:
        raise _incomplete(manifest, error) from None
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            raise CheckpointError(f"{manifest} names a file outside its folder: {name!r}; remove this checkpoint")
    return files


def _incomplete(manifest: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{manifest} cannot be read ({why}); the checkpoint is incomplete: remove or restore it")


def _is_entry(facts: Any) -> bool:
    return isinstance(facts, dict) and type(facts.get("size")) is int and isinstance(facts.get("sha256"), str)

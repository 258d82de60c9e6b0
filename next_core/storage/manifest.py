"""The manifest of a complete folder: digest and size of every file, precision and shape of every tensor.

The digest is XXH3-128: it finds torn writes, bit rot and mixed-up files at the speed of memory. Somebody who changes a
file on purpose can change its manifest too, so a cryptographic digest would protect no better. Manifests with sha256,
which next-core wrote before, are still verified.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import xxhash

from next_core.errors import CheckpointError, damaged, incomplete, unsafe_path
from next_core.storage.reading import (
    LARGE,
    Stamp,
    parse_checked,
    parse_json,
    read_bytes,
    read_header,
    stamp,
    with_checksum,
)

MANIFEST = "manifest.json"
DIGEST = "xxh3_128"
OLD_DIGEST = "sha256"
_UNSETTLED = 2 * 10**9
"""Nanoseconds after a write in which a second one may leave the same time: the clocks of file systems are coarse."""

T = TypeVar("T")


def digest_of(path: Path, algorithm: str = DIGEST) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128 if algorithm == DIGEST else algorithm).hexdigest()


def manifest_text(folder: Path, digests: Mapping[str, str] | None = None) -> str:
    """Return the manifest of a folder as it is now; files that are in ``digests`` are not read again."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        name = path.relative_to(folder).as_posix()
        digest = (digests or {}).get(name) or digest_of(path)
        facts = {DIGEST: digest, "size": path.stat().st_size} | _tensors(path)
        # One line each by hand: with an indent, the json module takes 10 times as long.
        lines.append(f"{json.dumps(name)}: {json.dumps(facts)}")
    return with_checksum('{"files": {\n' + ",\n".join(lines) + "\n}}").decode()


def _tensors(path: Path) -> dict[str, Any]:
    """Return precision and shape of each tensor of a safetensors file; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        entries = read_header(path)
    except ValueError:
        return {}  # whoever opens this file will report it
    return {"tensors": {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in entries.items()}}


def check_manifest(folder: Path, contents: bool = False) -> None:
    """Compare sizes and safetensors headers in a folder with its manifest; with ``contents`` every digest as well.

    Raises ``CheckpointError`` for a difference, and for a missing or damaged manifest.
    """
    for name, facts in _files(folder / MANIFEST).items():
        path = folder / name
        _check_size(path, facts)
        if "tensors" in facts and _tensors(path).get("tensors") != facts["tensors"]:
            raise damaged(path, f"is damaged: its header differs from {MANIFEST}")
        if contents:
            _check_digest(path, facts)


def check_contents(path: Path) -> None:
    """Compare the bytes of a file with the manifest in its folder or the one above, if there is one.

    Raises ``CheckpointError`` for a difference, and for a file that the manifest does not list. The digest is cached in
    this process until the file changes.
    """
    for folder in (path.parent, path.parent.parent):
        manifest = folder / MANIFEST
        if os.path.lexists(manifest) and (folder == path.parent or not _is_foreign(manifest)):
            facts = _files(manifest).get(path.relative_to(folder).as_posix())
            if facts is None:
                raise CheckpointError(
                    f"{path} is not listed in {manifest}: it was added later; remove it", kind="checkpoint-damaged"
                )
            _check_size(path, facts)
            _check_digest(path, facts)
            return


def _is_foreign(manifest: Path) -> bool:
    """Return whether a file of this name, above a folder of checkpoints, belongs to another program."""
    try:
        content = parse_json(read_bytes(manifest, LARGE), finite=False)
    except (OSError, ValueError):
        return False
    return not isinstance(content, dict) or "files" not in content


def _check_size(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        complete = path.is_file() and path.stat().st_size == facts["size"]
    except OSError:  # the manifest names something that cannot be a file
        complete = False
    if not complete:
        raise incomplete(path, f"is missing or truncated ({facts['size']} bytes expected)")


def _check_digest(path: Path, facts: Mapping[str, Any]) -> None:
    algorithm = DIGEST if DIGEST in facts else OLD_DIGEST
    if file_digest(path, algorithm) != facts[algorithm]:
        raise damaged(path, f"is damaged: its {algorithm} differs from {MANIFEST}")


def file_digest(path: Path, algorithm: str = DIGEST) -> str:
    """Return the digest of a file, cached until it changes. Raises ``CheckpointError`` if it cannot be read."""
    return _cached_until_changed(path, _digest, algorithm)


def _files(manifest: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a manifest. Raises ``CheckpointError`` for a missing, damaged or unsafe one."""
    if not os.path.lexists(manifest):
        raise incomplete(manifest, "is missing")
    return _cached_until_changed(manifest, _entries_of)


def _cached_until_changed(path: Path, read: Callable[..., T], *more: str) -> T:
    """Call a cached reader with the stamp of a file as part of its key; a file written just now bypasses the cache."""
    try:
        now = stamp(path)
        settled = time.time_ns() - now[2] > _UNSETTLED
        return read(path.absolute(), now, *more) if settled else read.__wrapped__(path, now, *more)  # type: ignore[attr-defined]
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, stamp: Stamp, algorithm: str) -> str:
    return digest_of(path, algorithm)


@functools.lru_cache(maxsize=16)
def _entries_of(manifest: Path, stamp: Stamp) -> dict[str, dict[str, Any]]:
    try:
        files = parse_checked(read_bytes(manifest, LARGE)).get("files")
        if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
            raise ValueError("it does not list files with their digest and size")  # noqa: TRY301
    except ValueError as error:
        raise damaged(manifest, f"cannot be read ({error})") from None
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            raise unsafe_path(f"{manifest} names a file outside its folder: {name!r}; remove this checkpoint")
    return files


def _is_entry(facts: Any) -> bool:
    if not isinstance(facts, dict) or type(facts.get("size")) is not int:
        return False
    return isinstance(facts.get(DIGEST, facts.get(OLD_DIGEST)), str)

"""Decomposed deltas on disk, keyed by what they were made of: a second predictor on the same run finds them there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from next_core.interfaces import CheckpointSource, Compressor
from next_core.mathematics.low_rank import Factors
from next_core.storage.atomic import atomic_file, is_alive
from next_core.types import Span

VERSION = 1
"""Part of every key: to be raised when the same checkpoints give other bytes."""
LIMIT_BYTES = 10 * 2**30
ENTRIES = "deltas"
"""The folder in a cache's folder that is the cache's own: whatever else lies beside it is left alone."""
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFT_OVER = re.compile(r"\.[0-9a-f]{64}\.safetensors\.tmp-(\d+)")
_PARTS = ("U", "S", "V", "energy", "nuclear")


def default_folder() -> Path:
    """``next-core`` under the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-core"


class DeltaCache:
    """One file for each delta or Gram matrix of all matrices of a run, the least recently used dropped above a limit.

    Nothing here can fail a computation: what cannot be read is computed again, what cannot be written is left out, and
    ``trouble`` says why.
    """

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES, compressor_version: str = "") -> None:
        self.folder, self.limit, self.compressor_version = folder / ENTRIES, limit, compressor_version
        self.trouble: str | None = None

    def load(self, key: str | None, names: Sequence[str]) -> dict[str, Factors] | None:
        """The triplets of these matrices, leading dimension 1; None where they are not all there."""
        tensors = self._read(key)
        made = {}
        for name in names:
            parts = [tensors.get(f"{name}|{part}") for part in _PARTS]
            U, S, V, energy, nuclear = parts
            if U is None or S is None or V is None or energy is None:
                return None
            made[name] = Factors(U.mT, S, V.mT, energy, nuclear)
        return made

    def save(self, key: str | None, made: Mapping[str, Factors]) -> None:
        """Keep triplets of leading dimension 1."""
        tensors: dict[str, Tensor] = {}
        for name, found in made.items():
            # Transposed, as they are made: the long side is contiguous.
            values = (found.U.mT, found.S, found.V.mT, found.energy, found.nuclear)
            tensors |= {
                f"{name}|{part}": x.contiguous() for part, x in zip(_PARTS, values, strict=True) if x is not None
            }
        self._write(key, tensors)

    def load_tensors(self, key: str | None, names: Sequence[str]) -> dict[str, Tensor] | None:
        """One tensor of each of these matrices; None where they are not all there."""
        tensors = self._read(key)
        return {name: tensors[name] for name in names} if all(name in tensors for name in names) else None

    def save_tensors(self, key: str | None, made: Mapping[str, Tensor]) -> None:
        """Keep one tensor of each matrix."""
        self._write(key, {name: x.contiguous() for name, x in made.items()})

    def _read(self, key: str | None) -> dict[str, Tensor]:
        if key is None:
            return {}
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                # Copied: a file that is dropped while it is mapped would take the process with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            with contextlib.suppress(OSError):  # another user's: read, but not marked as used
                os.utime(path)
        except FileNotFoundError:
            return {}
        except (SafetensorError, OSError) as error:
            self.trouble = f"{path} cannot be read ({error}); it was computed again"
            return {}
        return tensors

    def _write(self, key: str | None, tensors: Mapping[str, Tensor]) -> None:
        if key is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as scratch:
                save_file(dict(tensors), scratch)
            self._drop_oldest()
        except (SafetensorError, OSError) as error:  # a full disk, a folder that may not be written
            self.trouble = f"{self.folder} cannot be written ({error}); what was computed is not kept"

    def _drop_oldest(self) -> None:
        files = []
        for path in self.folder.iterdir():
            left_over = _LEFT_OVER.fullmatch(path.name)
            if left_over is not None and not is_alive(int(left_over[1])):
                path.unlink(missing_ok=True)
            elif _ENTRY.fullmatch(path.name):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def spans_key(source: CheckpointSource, spans: Sequence[Span], *more: object) -> str | None:
    """A digest of what some deltas' weights are made of, and of how they are used; None for what is not on disk."""
    made_of = [source.fingerprint(step) for span in spans for step in span]
    if None in made_of:
        return None
    kind = type(source).__module__, type(source).__qualname__
    return hashlib.sha256(repr((VERSION, torch.__version__, kind, made_of, more)).encode()).hexdigest()


def how(compressor: Compressor, rank: int, spectrum: bool, version: str) -> tuple[object, ...]:
    """What decides the triplets of a delta besides its weights."""
    kind = type(compressor).__module__, type(compressor).__qualname__, version
    return kind, compressor.config.model_dump_json(), rank, spectrum

"""Decomposed deltas on disk, keyed by their inputs: a second predictor on the same run finds them there."""

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

VERSION = 1  # Part of every key; raise it when the same checkpoints give different bytes
LIMIT_BYTES = 10 * 2**30
ENTRIES = "deltas"  # The subfolder that belongs to the cache; other files in its folder are left alone
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFT_OVER = re.compile(r"\.[0-9a-f]{64}\.safetensors\.tmp-(\d+)")
_PARTS = ("U", "S", "V", "energy", "nuclear")


def default_folder() -> Path | None:
    """Return ``next-core`` in the user's cache folder (``XDG_CACHE_HOME``, or ``~/.cache``); None without a home."""
    with contextlib.suppress(RuntimeError):  # a container may run as a user that it does not know
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-core"
    return None


class DeltaCache:
    """One file per delta, or set of inner products, of all matrices of a run; bounded, least recently used first out.

    The cache never makes a computation fail: results that cannot be read are computed again, results that cannot be
    written are dropped, and ``trouble`` says why.
    """

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES, compressor_version: str = "") -> None:
        self.folder, self.limit, self.compressor_version = folder / ENTRIES, limit, compressor_version
        self.trouble: str | None = None

    def load(self, key: str | None, names: Sequence[str]) -> dict[str, Factors] | None:
        """Return the triplets of these matrices, leading dimension 1; None unless all are there."""
        tensors = self._read(key)
        made = {}
        for name in names:
            U, S, V, energy, nuclear = (tensors.get(f"{name}|{part}") for part in _PARTS)
            if U is None or S is None or V is None or energy is None:
                return None
            made[name] = Factors(U.mT, S, V.mT, energy, nuclear)
        return made

    def save(self, key: str | None, made: Mapping[str, Factors]) -> None:
        """Store triplets of leading dimension 1."""
        tensors: dict[str, Tensor] = {}
        for name, found in made.items():
            # Stored transposed, as they are computed: the long side is contiguous.
            values = (found.U.mT, found.S, found.V.mT, found.energy, found.nuclear)
            tensors |= {
                f"{name}|{part}": x.contiguous() for part, x in zip(_PARTS, values, strict=True) if x is not None
            }
        self._write(key, tensors)

    def load_tensors(self, key: str | None, names: Sequence[str]) -> dict[str, Tensor] | None:
        """Return one tensor for each of these matrices; None unless all are there."""
        tensors = self._read(key)
        return {name: tensors[name] for name in names} if all(name in tensors for name in names) else None

    def save_tensors(self, key: str | None, made: Mapping[str, Tensor]) -> None:
        """Store one tensor for each matrix."""
        self._write(key, {name: x.contiguous() for name, x in made.items()})

    def _read(self, key: str | None) -> dict[str, Tensor]:
        if key is None:
            return {}
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                # Copied, because a read of mapped memory whose file was truncated kills the process.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            with contextlib.suppress(OSError):  # another user's file cannot be marked as used
                os.utime(path)
        except FileNotFoundError:
            return {}
        except (SafetensorError, OSError) as error:
            self.trouble = f"cannot read {path} ({error}); the result was computed again"
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
        except (SafetensorError, OSError) as error:  # a full disk, or a folder without write permission
            self.trouble = f"cannot write {self.folder} ({error}); results are not cached"

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


def cache_key(source: CheckpointSource, spans: Sequence[Span], *settings: object) -> str | None:
    """Return a digest of the weights of some deltas and of the settings; None if the weights have no fingerprint."""
    fingerprints = [source.fingerprint(step) for span in spans for step in span]
    if None in fingerprints:
        return None
    kind = type(source).__module__, type(source).__qualname__
    return hashlib.sha256(repr((VERSION, torch.__version__, kind, fingerprints, settings)).encode()).hexdigest()


def compression_settings(compressor: Compressor, rank: int, spectrum: bool, version: str) -> tuple[object, ...]:
    """Return everything except the weights that decides the triplets of a delta."""
    kind = type(compressor).__module__, type(compressor).__qualname__, version
    return kind, compressor.config.model_dump_json(), rank, spectrum

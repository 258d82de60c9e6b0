"""What all sources on disk share: step folders, safetensors files read safely, metrics of the trainer's state."""

from __future__ import annotations

import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.storage import MANIFEST, check_manifest

LAYOUTS: dict[re.Pattern[str], tuple[str, ...]] = {
    re.compile(r"(?:checkpoint|step)-(\d+)"): ("",),  # transformers and TRL; this project
    re.compile(r"global_step(\d+)_hf"): ("",),  # OpenRLHF with --ckpt.save_hf
    re.compile(r"global_step_(\d+)"): ("actor/lora_adapter", "actor/huggingface"),  # verl
}
"""How trainers name the folder of a step, and where in it the weights may lie."""
WRITTEN_LAST = "tokenizer_config.json"
"""OpenRLHF writes the tokenizer last: without it one of its folders is incomplete."""
JUMPS = "jumps"
JUMP_RECORD = "jump.json"
UNDONE = "undone.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SHIFT_FILE = "shift.safetensors"
CACHE_BYTES = 256 * 2**20
"""What one cache of tensors may hold."""


def find_step_folders(root: Path, known: Container[int] = ()) -> dict[int, Path]:
    """The folder of each step under ``root``, whichever trainer wrote it (``LAYOUTS``), by ascending step.

    Those in ``known`` are not checked again. Raises ``CheckpointError`` when ``root`` is missing, two names stand for
    one step, or a folder is incomplete: by this project's manifest, or by OpenRLHF's order of writing.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder; pass the folder that holds checkpoint-N or step-N")
    found: dict[int, Path] = {}
    for path in root.iterdir():
        named = step_folder(path)
        if named is None:
            continue
        step, folder = named
        if step in found:
            there, here = found[step].relative_to(root), folder.relative_to(root)
            raise CheckpointError(f"step {step} is there twice: {there} and {here}; remove one")
        found[step] = folder
    for step, path in found.items():
        if step in known:
            continue
        if path.name.startswith("step-") or (path / MANIFEST).exists():
            check_manifest(path)
        if path.name.endswith("_hf") and not (path / WRITTEN_LAST).exists():
            raise CheckpointError(f"{path} is incomplete: the tokenizer, written last, is missing; remove it")
    return dict(sorted(found.items()))


def step_folder(path: Path) -> tuple[int, Path] | None:
    """The step that a folder's name stands for, and where in it the weights lie; None for any other folder."""
    for pattern, places in LAYOUTS.items():
        match = pattern.fullmatch(path.name)
        if match is not None and path.is_dir():
            inside = [path / place for place in places]
            return int(match[1]), next((folder for folder in inside if folder.is_dir()), inside[0])
    return None


def holds(root: Path, files: Collection[str]) -> bool:
    """Whether some step's folder under ``root`` holds one of these files."""
    named = [step_folder(child) for child in root.iterdir()] if root.is_dir() else []
    return any((found[1] / file).exists() for found in named if found is not None for file in files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``CheckpointError`` naming the file when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete: remove or restore it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove or restore this checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where a JSON object is expected")
    return value


class SafetensorsFile:
    """One safetensors file: shapes from its header, tensors on demand through a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete: remove or restore it")
        try:
            self._file = _memory_map(path)
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}); remove or restore this checkpoint"
            ) from None

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """One tensor or some rows of it, at least fp32. Raises ``CheckpointError`` when they hold NaN or Inf."""
        try:
            tensor: Tensor = self._file.get_tensor(key) if rows is None else self._file.get_slice(key)[rows]
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: no tensor '{key}' ({error})") from None
        if tensor.dtype.itemsize < 4:
            tensor = tensor.float()
        # A sum is finite only if its terms are; one pass, where isfinite().all() makes a mask first.
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise CheckpointError(f"{self.path}: '{key}' holds NaN or Inf; remove this checkpoint")
        return tensor


def _memory_map(path: Path) -> Any:
    return safe_open(path, framework="pt")


class Shifts:
    """The jumps of a run folder (``jumps/`` beside ``checkpoints/``), counted into the checkpoints before them.

    A jump made after step N moves every checkpoint up to N by as much: deltas between checkpoints then show what RL
    did, and not what a jump did. A jump that lives in an adapter of its own has nothing to shift. Where a jump was
    undone some steps later, the history starts anew at ``start``.
    """

    def __init__(self, checkpoints: Path) -> None:
        # A trainer's own folder holds weights from after each jump, and brings its jump adapters along.
        self.ours = checkpoints.name == CHECKPOINTS
        self.start = 0
        self._root = checkpoints.parent / JUMPS
        self._cache = TensorCache()
        self._shifts: dict[tuple[str, int], tuple[int, Shift]] = {}  # a number can be used again after a rollback

    def refresh(self) -> None:
        """Take in jumps that were made, and forget those that were rolled back."""
        if not self.ours:
            return
        self.start = max((undone for _, _, undone in jump_records(self._root) if undone is not None), default=0)
        present = {}
        for path, record in jump_folders(self._root):
            if (path / SHIFT_FILE).exists():
                present[path.name, (path / SHIFT_FILE).stat().st_mtime_ns] = record["step"], path / SHIFT_FILE
        for key, (step, file) in present.items():
            if key not in self._shifts:
                self._shifts[key] = step, Shift(file, self._cache)
        self._shifts = {key: self._shifts[key] for key in present}

    def made_after(self, step: int) -> list[Shift]:
        """The shifts of the jumps made right after a step, undone later or not."""
        records = jump_records(self._root) if self.ours else []
        found = [path / SHIFT_FILE for path, record, _ in records if record["step"] == step]
        return [Shift(path, TensorCache()) for path in found if path.exists()]

    def since(self, step: int) -> tuple[Shift, ...]:
        """The shifts of the jumps made at or after a step, in order."""
        return tuple(shift for jumped, shift in self._shifts.values() if step <= jumped)


_SHIFTS = itertools.count()


class Shift:
    """What one jump moved each stored tensor by, read on demand."""

    def __init__(self, path: Path, cache: TensorCache) -> None:
        self._file = SafetensorsFile(path)
        self._cache = cache
        self._number = next(_SHIFTS)  # an id() comes back once its object is gone, and a folder's name after a rollback

    def added(self, value: Tensor, key: str, rows: slice | None = None) -> Tensor:
        """A stored tensor, or some rows of one, with the jump in it; the same where the jump left it alone."""
        if key not in self._file.shapes:
            return value
        shape = self._file.shapes[key]
        if shape[1:] != tuple(value.shape[1:]) or (rows is None and shape[0] != value.shape[0]):
            raise CheckpointError(
                f"{self._file.path}: '{key}' is {shape} but the checkpoints have {tuple(value.shape)}; these are jumps "
                "of another run"
            )
        if rows is not None:
            return value + self._file.read(key, rows)
        where = key, self._number
        cached = self._cache.get(where)
        if cached is None:
            cached = (self._file.read(key),)
            self._cache.put(where, cached)
        return value + cached[0]


def jump_folders(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The jumps that stand, in order: their folders and records."""
    return [(path, record) for path, record, undone in jump_records(root) if undone is None]


def jump_records(root: Path) -> list[tuple[Path, dict[str, Any], int | None]]:
    """The folders under ``jumps/``, in order, with their records, and the step at which one was undone."""
    if not root.is_dir():
        return []
    paths = sorted(path for path in root.iterdir() if path.name.isdigit())
    return [
        (path, _record(path / JUMP_RECORD), _record(path / UNDONE)["step"] if (path / UNDONE).exists() else None)
        for path in paths
    ]


def _record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record.get("step"), int):
        raise CheckpointError(f"{path} names no step; restore it, or remove {path.parent}")
    return record


class TensorCache:
    """The most recently read tensors, up to ``CACHE_BYTES``."""

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
            _, old = self._values.popitem(last=False)
            self._bytes -= sum(tensor.nbytes for tensor in old)


def read_metrics(folders: Mapping[int, Path]) -> dict[int, dict[str, float]]:
    """Logged metrics by step: from the newest ``trainer_state.json``, or from ``metrics.jsonl`` of a run folder."""
    logged: list[dict[str, Any]] = []
    if folders:
        newest = folders[max(folders)]
        if (newest / "trainer_state.json").exists():
            logged = read_json(newest / "trainer_state.json").get("log_history", [])
            if not isinstance(logged, list):
                raise CheckpointError(f"{newest / 'trainer_state.json'}: log_history is no list; restore the file")
        elif (newest.parent.parent / METRICS).exists():
            lines = (newest.parent.parent / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines:
                try:
                    logged.append(json.loads(line))
                except (ValueError, RecursionError):
                    continue  # torn: the run was killed while it wrote
    metrics: dict[int, dict[str, float]] = {}
    for record in logged:
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            metrics.setdefault(record["step"], {}).update(numbers)
    return metrics


def metrics_at(metrics: Mapping[int, Mapping[str, float]], step: int, since: int | None = None) -> Mapping[str, float]:
    """The last metrics logged at or before a step, and after ``since``."""
    past = [logged for logged in metrics if logged <= step and (since is None or logged > since)]
    return metrics[max(past)] if past else {}

"""Open the checkpoints of a run, whatever their layout."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError, ConfigError, PluginError, invalid_value, not_found
from next_core.interfaces import CheckpointSource
from next_core.plugins import registry
from next_core.sources.layouts import ADAPTER_FILES, MODEL_FILES, foreign_layout, has_any, step_folder

DEEPEST = 3  # How many folders deep weights are looked for where no layout fits


def open_checkpoints(
    path: str | Path | Sequence[str | Path],
    backbone: str | Path | None = None,
    layout: str | None = None,
    *,
    start: str | Path | None = None,
    skip_damaged: bool = False,
    allow_pickle: bool = False,
    masters: bool = False,
) -> CheckpointSource:
    """Open the checkpoints of a run; their layout is detected, or given by ``layout`` (the name of a source).

    ``path`` is the folder that contains them, a cache of the Hugging Face Hub, or a list of the checkpoints' own
    folders, with steps in their names. ``start`` is the adapter (or model) that RL began from, where the run kept no
    checkpoint of step 0: deltas count from it. ``skip_damaged`` skips damaged ones and lists them in the source's
    ``notes``; ``allow_pickle`` reads ``.bin`` files too, tensors only; ``masters`` takes fp32 weights from DeepSpeed's
    optimizer states instead of the stored ones (it needs DeepSpeed and ``allow_pickle``, as these pickles can run
    code).

    Raises ``CheckpointError`` if no layout fits or a checkpoint is damaged, ``PluginError`` for an unknown layout, and
    ``ConfigError`` for a setting that the layout's source does not have.
    """
    folder, folders = _locate(path)
    fields: dict[str, Any] = {"path": folder, "backbone": None if backbone is None else _absolute(Path(backbone))}
    began = None if start is None else _absolute(Path(start))
    optional = {
        "folders": folders,
        "start": began,
        "skip_damaged": skip_damaged,
        "allow_pickle": allow_pickle,
        "masters": masters,
    }
    fields |= {field: value for field, value in optional.items() if value}
    layouts = {name: source for name in registry().names("source") if (source := _reads_folders(name)) is not None}
    if layout is not None and layout not in layouts:
        registry().get("source", layout)  # raises for an unknown or broken one
        raise invalid_value(f"the source '{layout}' does not read folders; layouts: {', '.join(layouts)}")
    name = layout or next((name for name, source in layouts.items() if _detects(source, folder, folders)), None)
    if name is None:
        raise CheckpointError(_why_nothing_fits(folder, folders, layouts), kind="checkpoint-unknown-layout")
    unknown = [field for field in fields if field not in layouts[name].config_class.model_fields]
    if unknown:
        raise ConfigError(f"the source '{name}' has no setting '{unknown[0]}'; leave it out", kind="config-unknown-key")
    opened: CheckpointSource = registry().make("source", name, **fields)
    return opened


def _locate(path: str | Path | Sequence[str | Path]) -> tuple[Path, tuple[Path, ...]]:
    """Return a folder above all checkpoints, and the folders that were listed."""
    if not isinstance(path, str | Path):
        listed = tuple(_absolute(Path(one)) for one in path)
        if not listed:
            raise not_found("the list of checkpoints is empty; pass at least two folders")
        return Path(os.path.commonpath([folder.absolute().parent for folder in listed])), listed
    folder = Path(path)
    if not folder.is_dir():
        raise not_found(f"{folder} is not a folder; pass the folder that holds checkpoint-N or step-N")
    return _absolute(folder), ()


def _absolute(path: Path) -> Path:
    """Return a folder's absolute path, valid in other working directories and processes; links keep their names."""
    if not path.is_dir():
        return path  # for the error message
    return path.resolve() if ".." in path.parts else path.absolute()


def _why_nothing_fits(folder: Path, folders: Sequence[Path], layouts: Mapping[str, type[CheckpointSource]]) -> str:
    known = ", ".join(layouts)
    foreign = next(filter(None, map(foreign_layout, folders or [folder])), None)
    if foreign is not None:
        return foreign
    if folders:
        return f"none of the {len(folders)} folders contains an adapter or a model of a known layout ({known})"
    fitting = [
        f"; did you mean {other}?"
        for other in (folder / "checkpoints", folder.parent)
        if other.is_dir() and any(_detects(source, other) for source in layouts.values())
    ]
    below = _below(folder)
    hint = next(filter(None, (*fitting, below) if has_any(folder) else (below, *fitting)), "")
    return (
        f"{folder} holds no checkpoints of a known layout ({known}); expected folders such as "
        f"checkpoint-10/adapter_model.safetensors{hint}"
    )


def _below(folder: Path) -> str:
    """Return how to name what lies deeper than the layouts say: one run's folder, or a list."""
    for depth in range(1, DEEPEST + 1):
        pattern = "*/" * depth
        weights = (path.parent for name in (*MODEL_FILES, *ADAPTER_FILES[1:]) for path in folder.glob(pattern + name))
        found = sorted(set(weights))
        runs = {path.parent for path in found if step_folder(path) is not None}
        if len(runs) == 1:
            return f"; did you mean {runs.pop()}?"
        if found:
            each = " ".join(f"--checkpoints {path}" for path in found[:2])
            return f"; {len(found)} folders in it have weights: list those of one run, {each} ..."
    return ""


def _reads_folders(name: str) -> type[CheckpointSource] | None:
    """Return the source of this name if it reads folders; None also for a broken one, which `plugins` lists."""
    try:
        source: type[CheckpointSource] = registry().get("source", name)
    except PluginError:
        return None
    return source if "path" in source.config_class.model_fields else None


def _detects(source: type[CheckpointSource], folder: Path, folders: Sequence[Path] = ()) -> bool:
    detect: Any = source.detect
    try:
        if not folders:
            return bool(detect(folder))
        return "folders" in source.config_class.model_fields and bool(detect(folder, folders))
    except Exception:  # a third party's error must not hide the other layouts
        return False

"""Open the checkpoints of a run, whatever their layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from next_core.errors import CheckpointError, ConfigError, PluginError
from next_core.interfaces import CheckpointSource
from next_core.plugins import registry
from next_core.sources.layouts import common_folder


def open_checkpoints(
    path: str | Path | Sequence[str | Path],
    backbone: str | Path | None = None,
    layout: str | None = None,
    *,
    skip_damaged: bool = False,
    allow_pickle: bool = False,
    masters: bool = False,
) -> CheckpointSource:
    """The source of a run's checkpoints; the layout is detected, or named by ``layout`` (a source's name).

    ``path`` is the folder that holds them, a cache of the Hugging Face Hub, or a list of the checkpoints' own folders
    with steps in their names. ``skip_damaged`` goes on without damaged ones and says so in the source's ``notes``;
    ``allow_pickle`` reads ``.bin`` files too, tensors only; ``masters`` takes the fp32 weights from DeepSpeed's
    optimizer states instead of the stored ones (needs DeepSpeed and ``allow_pickle``, as these pickles can run code).

    Raises ``CheckpointError`` when no layout fits or a checkpoint is damaged, ``PluginError`` for an unknown layout,
    ``ConfigError`` for a setting that the layout's source does not have.
    """
    folder, folders = _where(path)
    fields: dict[str, Any] = {"path": folder, "backbone": None if backbone is None else _absolute(Path(backbone))}
    fields |= {"folders": folders} if folders else {}
    fields |= {"skip_damaged": True} if skip_damaged else {}
    fields |= {"allow_pickle": True} if allow_pickle else {}
    fields |= {"masters": True} if masters else {}
    known = {name: found for name in registry().names("source") if (found := _on_disk(name)) is not None}
    if layout is not None and layout not in known:
        registry().get("source", layout)  # unknown or broken, and why
        raise ConfigError(f"the source '{layout}' does not read folders; layouts: {', '.join(known)}")
    name = layout or next((name for name, found in known.items() if _claims(found, folder, folders)), None)
    if name is None:
        raise CheckpointError(_nothing(folder, folders, known))
    lacks = [field for field in fields if field not in known[name].config_class.model_fields]
    if lacks:
        raise ConfigError(f"the source '{name}' has no setting '{lacks[0]}', which was asked for; leave it out")
    source: CheckpointSource = registry().make("source", name, **fields)
    return source


def _where(path: str | Path | Sequence[str | Path]) -> tuple[Path, tuple[Path, ...]]:
    """A folder above all checkpoints, and the folders that were listed."""
    if not isinstance(path, str | Path):
        listed = tuple(Path(one) for one in path)
        if not listed:
            raise CheckpointError("the list of checkpoints is empty; pass at least two folders")
        listed = tuple(_absolute(one) for one in listed)
        return common_folder(listed), listed
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass the folder that holds checkpoint-N or step-N")
    return _absolute(folder), ()


def _absolute(path: Path) -> Path:
    """The same place, whatever the working directory is later, or in another process; with its own name."""
    if not path.is_dir():
        return path  # to be named as it was given
    return path.resolve() if ".." in path.parts else path.absolute()


def _nothing(folder: Path, folders: Sequence[Path], known: dict[str, type[CheckpointSource]]) -> str:
    """Why nothing could be opened, and where to look."""
    if folders:
        gone = next((path for path in folders if not path.is_dir()), None)
        if gone is not None:
            return f"{gone} is not a folder; list the folders of the checkpoints"
        return f"none of the {len(folders)} folders holds an adapter or a model of a known layout ({', '.join(known)})"
    near = (other for other in (folder / "checkpoints", folder.parent) if other.is_dir())
    right = next((other for other in near if any(_claims(found, other) for found in known.values())), None)
    hint = "" if right is None else f"; did you mean {right}?"
    return (
        f"{folder} holds no checkpoints of a known layout ({', '.join(known)}); expected folders such as "
        f"checkpoint-10/adapter_model.safetensors{hint}"
    )


def _on_disk(name: str) -> type[CheckpointSource] | None:
    """The source of this name if it reads a folder; None too for one that cannot be loaded, which `plugins` lists."""
    try:
        source: type[CheckpointSource] = registry().get("source", name)
    except PluginError:
        return None
    return source if "path" in source.config_class.model_fields else None


def _claims(source: type[CheckpointSource], folder: Path, folders: Sequence[Path] = ()) -> bool:
    detect: Any = source.detect
    try:
        if not folders:
            return bool(detect(folder))
        return "folders" in source.config_class.model_fields and bool(detect(folder, folders))
    except Exception:  # anybody's code: it must not keep the other layouts from being found
        return False

"""Open a folder of checkpoints, whatever its layout."""

from __future__ import annotations

from pathlib import Path

from next_core.errors import CheckpointError, ConfigError, PluginError
from next_core.interfaces import CheckpointSource
from next_core.plugins import registry


def open_checkpoints(
    path: str | Path, backbone: str | Path | None = None, layout: str | None = None
) -> CheckpointSource:
    """The source of a folder; the layout is detected, or named by ``layout``.

    Raises ``CheckpointError`` when no layout fits or a checkpoint is damaged, ``PluginError`` for an unknown layout.
    """
    folder = Path(path)
    if not folder.name:
        folder = folder.absolute()  # ".": what lies beside it has to be found
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass the folder that holds checkpoint-N or step-N")
    fields = {"path": folder, "backbone": Path(backbone) if backbone is not None else None}
    known = {name: found for name in registry().names("source") if (found := _on_disk(name)) is not None}
    if layout is not None and layout not in known:
        registry().get("source", layout)  # unknown or broken, and why
        raise ConfigError(f"the source '{layout}' does not read folders; layouts: {', '.join(known)}")
    name = layout or next((name for name, found in known.items() if _claims(found, folder)), None)
    if name is None:
        near = (other for other in (folder / "checkpoints", folder.parent) if other.is_dir())
        right = next((other for other in near if any(_claims(found, other) for found in known.values())), None)
        hint = "" if right is None else f"; did you mean {right}?"
        raise CheckpointError(
            f"{folder} holds no checkpoints of a known layout ({', '.join(known)}); expected folders such as "
            f"checkpoint-10/adapter_model.safetensors{hint}"
        )
    source: CheckpointSource = registry().make("source", name, **fields)
    return source


def _on_disk(name: str) -> type[CheckpointSource] | None:
    """The source of this name if it reads a folder; None too for one that cannot be loaded, which `plugins` lists."""
    try:
        source: type[CheckpointSource] = registry().get("source", name)
    except PluginError:
        return None
    return source if "path" in source.config_class.model_fields else None


def _claims(source: type[CheckpointSource], folder: Path) -> bool:
    try:
        return source.detect(folder)
    except Exception:  # anybody's code: it must not keep the other layouts from being found
        return False

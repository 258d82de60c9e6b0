"""Open a folder of checkpoints, whatever its layout."""

from __future__ import annotations

from pathlib import Path

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.plugins import registry


def open_checkpoints(
    path: str | Path, backbone: str | Path | None = None, layout: str | None = None
) -> CheckpointSource:
    """The source of a folder; the layout is detected, or named by ``layout``.

    Raises ``CheckpointError`` when no layout fits or a checkpoint is damaged, ``PluginError`` for an unknown layout.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass the folder that holds checkpoint-N or step-N")
    fields = {"path": folder, "backbone": Path(backbone) if backbone is not None else None}
    known = registry().names("source")
    name = layout or next((n for n in known if registry().get("source", n).detect(folder)), None)
    if name is None:
        raise CheckpointError(
            f"{folder} holds no checkpoints of a known layout ({', '.join(known)}); expected folders such as "
            "checkpoint-10/adapter_model.safetensors"
        )
    source: CheckpointSource = registry().make("source", name, **fields)
    return source

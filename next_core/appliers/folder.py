"""What the appliers that write folders share."""

from __future__ import annotations

import shutil
from pathlib import Path

from next_core.errors import ConfigError
from next_core.interfaces import Applied, Prediction


class WrittenFolder(Applied):
    """A folder that was written; rolling back removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rollback(self) -> None:
        shutil.rmtree(self.path)


def checked_target(prediction: Prediction, out: str | Path) -> Path:
    """The target folder. Raises ``ConfigError`` when it exists, or lies on or in what the prediction is read from."""
    target = Path(out)
    config = prediction.source.config
    for what in ("path", "backbone"):
        read = getattr(config, what, None)
        if read is not None and target.resolve().is_relative_to(Path(read).resolve()):
            raise ConfigError(f"{target} lies in {read}, which is being read; choose a folder outside it")
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder or remove it")
    return target

"""What the appliers that write folders share."""

from __future__ import annotations

import shutil
from pathlib import Path

from next_core.errors import ConfigError, PluginError
from next_core.interfaces import Applied, Prediction


class WrittenFolder(Applied):
    """A folder that was written; rolling back removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rollback(self) -> None:
        shutil.rmtree(self.path)


def checked_target(prediction: Prediction, out: str | Path, backbone: Path | None = None) -> Path:
    """The target folder. Raises ``ConfigError`` when it exists, or lies on or in what is read for it.

    ``PluginError`` when the prediction moves a parameter that the run does not have.
    """
    target = Path(out)
    config = prediction.source.config
    unknown = set(prediction.updates) - {parameter.name for parameter in prediction.source.parameters}
    if unknown:
        raise PluginError(f"the prediction names '{min(unknown)}', which the run does not have")
    for read in (getattr(config, "path", None), getattr(config, "backbone", None), backbone):
        if read is not None and target.resolve().is_relative_to(Path(read).resolve()):
            raise ConfigError(f"{target} lies in {read}, which is being read; choose a folder outside it")
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder or remove it")
    return target

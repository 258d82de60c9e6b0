"""The base of appliers that write folders: one folder, or one for each of several alphas."""

import math
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from next_core.errors import ConfigError, contradiction, invalid_value
from next_core.interfaces import Applied, CheckpointSource, Prediction, WeightApplier
from next_core.storage.atomic import check_can_be_folder, enough_space, new_directory, seal

SMALL_FILES = 64 * 2**20  # Bytes reserved on the disk for everything but weights: tokenizer, card, records


@dataclass
class WrittenFolder(Applied):
    """A folder that an applier wrote; rolling back removes it."""

    path: Path
    record: Mapping[str, Any]
    """The content of ``extrapolation.json``."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """By parameter the share of the jump that is left after rounding; empty where nothing is rounded."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """The digests of the files that were hashed while they were written, by name."""

    @property
    def share(self) -> float | None:
        """The share of the whole jump that is left after rounding; None where nothing is rounded."""
        return self.record.get("share_of_jump")

    def rollback(self) -> None:
        shutil.rmtree(self.path)


class FolderApplier(WeightApplier):
    """Writes new folders."""

    @abstractmethod
    def check_source(self, source: CheckpointSource, out: str | Path, dry_run: bool = False) -> Path:
        """Return the target folder. Raises ``ConfigError`` for a run or target that cannot be written.

        In a ``dry_run`` the target may exist already.
        """

    def check(self, prediction: Prediction, out: str | Path) -> Path:
        """Return the target folder; raises as ``check_source`` does, and ``PluginError`` for unknown parameters."""
        target = self.check_source(prediction.source, out)
        for name in prediction.updates:
            prediction.parameter(name)
        return target

    @abstractmethod
    def needed(self, prediction: Prediction) -> int:
        """Return an upper bound of one folder's weights in bytes."""

    @abstractmethod
    def write(self, prediction: Prediction, alpha: float, folder: Path) -> WrittenFolder:
        """Fill an empty folder. Raises ``GuardError`` for weights that are not finite."""

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: str | Path) -> WrittenFolder:
        return self.apply_each(prediction, {alpha: "."}, out)[alpha]

    def apply_each(
        self, prediction: Prediction, names: Mapping[float, str], out: str | Path
    ) -> dict[float, WrittenFolder]:
        """Write ``out/NAME`` for each alpha, all of them or none; the name "." is ``out`` itself."""
        target = self.check(prediction, out)
        written: dict[float, WrittenFolder] = {}
        digests: dict[str, str] = {}
        with (
            enough_space(target, len(names) * (self.needed(prediction) + SMALL_FILES)),
            new_directory(target, digests=digests) as scratch,
        ):
            for alpha, name in names.items():
                folder = scratch / name
                folder.mkdir(exist_ok=True)
                written[alpha] = replace(self.write(prediction, alpha, folder), path=target / name)
                if folder != scratch:
                    seal(folder, written[alpha].digests)
                within = folder.relative_to(scratch)
                digests |= {(within / file).as_posix(): digest for file, digest in written[alpha].digests.items()}
        return written


def checked_target(
    source: CheckpointSource, out: str | Path, backbone: Path | None = None, *, dry_run: bool = False
) -> Path:
    """Return the target folder.

    Raises ``ConfigError`` when it lies in a folder that is being read or in a file, or exists; in a ``dry_run`` it may.
    """
    target = Path(out)
    config = source.config
    # The path of a listed run is the folder above all its checkpoints, often the user's working folder.
    checkpoints = getattr(config, "folders", ()) or (getattr(config, "path", None),)
    for read in (*checkpoints, getattr(config, "start", None), getattr(config, "backbone", None), backbone):
        if read is not None and target.resolve().is_relative_to(Path(read).resolve()):
            raise contradiction(f"{target} lies in {read}, which is being read; choose a folder outside it")
    if target.exists() and not dry_run:
        raise ConfigError(
            f"{target} exists already; choose another folder or remove it", kind="config-folder-not-empty"
        )
    check_can_be_folder(target.parent)
    return target


def apply_sweep(
    applier: WeightApplier, prediction: Prediction, alphas: Sequence[float], out: str | Path
) -> dict[float, WrittenFolder]:
    """Write ``out/alpha-0.5``, ``out/alpha-1``, ...: all of them or none. Returns each folder by its alpha.

    Raises what ``folder_names`` and the applier raise, and ``ConfigError`` for an applier that writes no folders.
    """
    names = folder_names(alphas)
    if not isinstance(applier, FolderApplier):
        raise contradiction(f"a sweep needs a new folder for each alpha, and the applier '{applier.name}' makes none")
    return applier.apply_each(prediction, names, out)


def folder_names(alphas: Sequence[float]) -> dict[float, str]:
    """Return the folder name of each alpha. Raises ``ConfigError`` unless they are above 0 and have distinct names."""
    names = [f"alpha-{alpha:g}" for alpha in alphas]
    for alpha in alphas:
        if not 0 < alpha < math.inf:
            raise invalid_value(f"alphas must be numbers above 0 (got {alpha:g})")
    if not names:
        raise invalid_value("a sweep needs at least one alpha")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise invalid_value(f"two alphas share the folder {name}; list each alpha once")
    return {float(alpha): name for alpha, name in zip(alphas, names, strict=True)}

"""One prediction at several alphas: folders that differ in nothing but how far they jump."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeGuard

from next_core.appliers.folder_applier import SMALL_FILES, FolderApplier, WrittenFolder, outcome
from next_core.appliers.merged_model import MergedModelApplier
from next_core.errors import ConfigError
from next_core.interfaces import Prediction, WeightApplier
from next_core.storage.atomic import enough_space, new_directory


def apply_sweep(
    applier: WeightApplier, prediction: Prediction, alphas: Sequence[float], out: str | Path
) -> dict[float, WrittenFolder]:
    """Write ``out/alpha-0.5``, ``out/alpha-1``, ...: all of them or none. Returns each folder by its alpha.

    Each weight_delta is computed once, at alpha 1, and scaled. Raises ``ConfigError`` for an alpha that is not a
    number above 0, for two of one name, and for an applier that writes no new folders; and what the applier raises.
    """
    names = folder_names(alphas)
    if not makes_folders(applier):
        raise ConfigError(f"the applier '{applier.name}' makes no new folders here; a sweep needs one for each alpha")
    target = applier.check(prediction, out)
    digests: dict[str, str] = {}
    with (
        enough_space(target, len(names) * (applier.needed(prediction) + SMALL_FILES)),
        outcome(),
        new_directory(target, digests=digests) as folder,
        ExitStack() as stack,
    ):
        own: dict[float, dict[str, str]] = {alpha: {} for alpha in names}
        folders = {
            alpha: stack.enter_context(new_directory(folder / name, digests=own[alpha]))
            for alpha, name in names.items()
        }
        written = applier.write(prediction, folders)
        for alpha, name in names.items():
            own[alpha].update(written[alpha].digests)
            digests.update({f"{name}/{file}": digest for file, digest in own[alpha].items()})
    return {
        alpha: WrittenFolder(target / name, written[alpha].landed, written[alpha].facts)
        for alpha, name in names.items()
    }


def makes_folders(applier: WeightApplier) -> TypeGuard[FolderApplier]:
    """Whether an applier can write a folder for each of several alphas."""
    in_place = isinstance(applier, MergedModelApplier) and applier.config.in_place
    return isinstance(applier, FolderApplier) and not in_place


def folder_names(alphas: Sequence[float]) -> dict[float, str]:
    """The folder of each alpha in a sweep. Raises ``ConfigError`` for alphas that make none."""
    names = {float(alpha): f"alpha-{alpha:g}" for alpha in alphas}
    for alpha in names:
        if not 0 < alpha < math.inf:
            raise ConfigError(f"alphas must be numbers above 0 (got {alpha:g})")
    if not names:
        raise ConfigError("a sweep needs at least one alpha")
    if len(set(names.values())) < len(alphas):
        twice = sorted(name for name in names.values() if [f"alpha-{a:g}" for a in alphas].count(name) > 1)
        raise ConfigError(f"two alphas of one sweep would share the folder {twice[0]}; give each once")
    return names

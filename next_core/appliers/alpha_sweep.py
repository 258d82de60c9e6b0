"""One prediction at several alphas: folders that differ only in how far they jump."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from next_core.appliers.folder_applier import FolderApplier, WrittenFolder
from next_core.errors import contradiction, invalid_value
from next_core.interfaces import Prediction, WeightApplier


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

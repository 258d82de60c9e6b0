"""What differs between two checkpoints that should belong to one run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from next_core.sources.matrices import other_vocabulary
from next_core.storage.checkpoint_errors import other_model

MOST = 1000
"""Limit of names that are compared with one, and of characters of each: this is quadratic."""

Shapes = Mapping[str, tuple[int, ...]]


def check_same_shapes(ours: Shapes, theirs: Shapes, folder: Path, first: str) -> None:
    """Raise ``CheckpointError`` if ``theirs``, in ``folder``, differ from the shapes of the checkpoint ``first``."""
    difference = mismatch(ours, theirs, first)
    if difference is not None:
        raise other_model(f"{folder}: {difference}")


def mismatch(ours: Shapes, theirs: Shapes, first: str) -> str | None:
    """Return what differs in ``theirs`` (names to shapes) from the checkpoint called ``first``; None for nothing."""
    missing, new = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing and new:
        fitting = [name[:MOST] for name in new[:MOST] if theirs[name] == ours[missing[0]]] or new
        likeliest = difflib.get_close_matches(missing[0][:MOST], fitting, n=1, cutoff=0)[0]
        return (
            f"'{missing[0]}' of {first} is missing and '{likeliest}' is new (of {len(missing)} missing, {len(new)} "
            "new); did training rename its parameters? Extrapolate only checkpoints with the same names"
        )
    if missing:
        return f"'{missing[0]}' is missing, which {first} has ({len(missing)} in all); restore this checkpoint"
    if new:
        return f"'{new[0]}' is new, {first} does not have it ({len(new)} in all); are these checkpoints of one run?"
    for name, shape in ours.items():
        if theirs[name] != shape:
            why = "these are checkpoints of different runs"
            if other_vocabulary(name, theirs[name], shape):
                why = "the vocabulary was resized between them: extrapolate those before or after alone"
            return f"'{name}' is {theirs[name]} but {shape} in {first}; {why}"
    return None

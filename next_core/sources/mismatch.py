"""Words for a checkpoint that does not fit the others of its run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

MOST = 1000
"""Names that one is compared with, and letters of each: more would take long, and say no more."""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one[:MOST], other[:MOST], autojunk=False).ratio()


def mismatch(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], first: str) -> str | None:
    """What is different in ``theirs`` (names to shapes), against the checkpoint called ``first``; None for nothing."""
    missing, new = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing and new:
        shapes = {theirs[name] for name in new}
        renamed = next((name for name in missing if ours[name] in shapes), missing[0])
        fitting = [name for name in new if theirs[name] == ours[renamed]] or new
        now = max(fitting[:MOST], key=lambda name: _likeness(renamed, name))
        return (
            f"'{renamed}' of {first} is missing and '{now}' is new (of {len(missing)} missing, {len(new)} new); did "
            "training rename its parameters? Extrapolate only checkpoints of one naming"
        )
    if missing:
        return f"'{missing[0]}' is missing, which {first} has ({len(missing)} in all); restore this checkpoint"
    if new:
        return f"'{new[0]}' is new, {first} does not have it ({len(new)} in all); are these checkpoints of one run?"
    for name, shape in ours.items():
        if theirs[name] != shape:
            return f"'{name}' is {theirs[name]} but {shape} in {first}; these are checkpoints of different runs"
    return None

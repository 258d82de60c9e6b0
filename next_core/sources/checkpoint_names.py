"""Which number in a folder's name is its step."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from next_core.errors import CheckpointError

NUMBER = re.compile(r"\d+")
STEP_WORD = re.compile(r"(?:^|[^a-z])(?:global[-_ ]?)?(?:steps?|iter)[-_ ]?$", re.IGNORECASE)
MOST_STEPS = 10**15
"""More is no step: arithmetic with it would not be exact."""
REMEDY = "rename them to checkpoint-N, or pass the folders of one run as a list"


def skeleton(name: str, number: int | None = None) -> str:
    """A name with N for its numbers, or for that one only: ``lora-step10`` -> ``lora-stepN``."""
    found = list(NUMBER.finditer(name))
    if number is None:
        return NUMBER.sub("N", name)
    return name[: found[number].start()] + "N" + name[found[number].end() :]


def steps_in_names(names: Sequence[str], remedy: str = REMEDY) -> dict[str, tuple[int, str]]:
    """For each name its step, and what it looks like with N for the step.

    Names that differ only in their numbers are compared: the step is the number that is another one in every name. Of
    several such numbers (``epoch1-step300``, ``epoch2-step600``) it is the one after the word step. Raises
    ``CheckpointError`` naming the names where that leaves a doubt.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[skeleton(name)].append(name)
    found: dict[str, tuple[int, str]] = {}
    for group in alike.values():
        number = _the_step(group, remedy)
        found |= {name: (int(NUMBER.findall(name)[number]), skeleton(name, number)) for name in group}
    return found


def _the_step(group: Sequence[str], remedy: str) -> int:
    """Which of the numbers in names that are otherwise alike is the step."""
    columns = list(zip(*([int(number) for number in NUMBER.findall(name)] for name in group), strict=True))
    unique = [i for i, column in enumerate(columns) if len(set(column)) == len(column)]
    if len({columns[i] for i in unique}) == 1:
        return unique[-1]  # one number, or the same number twice
    named = [i for i in unique if STEP_WORD.search(group[0][: list(NUMBER.finditer(group[0]))[i].start()])]
    if len(named) == 1:
        return named[0]
    why = "several numbers could be the step" if unique else "no number is another one in each"
    if not columns:
        why = "there is no number in"
    raise CheckpointError(f"cannot tell the step of {shown(group)}: {why}; {remedy}")


def shown(names: Iterable[str]) -> str:
    """A few names, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def missing_steps(steps: Sequence[int], accounted: Iterable[int] = ()) -> tuple[int, ...]:
    """Steps that a regular spacing lacks: 30 of 10, 20, 40. Empty where no spacing is to be seen.

    The spacing is the commonest difference of neighbours (the smallest of several); a last checkpoint off the grid, as
    trainers write at the end, is none. ``accounted`` are those known to be missing.
    """
    pairs = list(itertools.pairwise(steps))
    differences = [later - earlier for earlier, later in pairs]
    if len(steps) < 3:
        return ()
    spacing = min(set(differences), key=lambda d: (-differences.count(d), d))
    gaps = [pair for pair, d in zip(pairs, differences, strict=True) if d > spacing and d % spacing == 0]
    # Counted before they are listed: between two that are timestamps there would be millions.
    if sum((later - earlier) // spacing - 1 for earlier, later in gaps) >= len(steps) - 1:
        return ()
    known = set(accounted)
    missing = (step for earlier, later in gaps for step in range(earlier + spacing, later, spacing))
    return tuple(step for step in missing if step not in known)

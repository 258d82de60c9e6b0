"""The step in the name of a checkpoint's folder."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from next_core.errors import ambiguous_step

NUMBER = re.compile(r"\d+")
STEP_WORD = re.compile(r"(?:^|[^a-z])(?:global[-_ ]?)?(?:steps?|iter)[-_ ]?$", re.IGNORECASE)
MULTIPLE = re.compile(r"[km](?![a-z])|[e.]\d", re.IGNORECASE)
"""What makes another number of the digits before it: 10k, 1e3, 0.5."""
LARGEST_STEP = 10**15  # Larger numbers are not steps; arithmetic with them would not be exact
REMEDY = "rename them to checkpoint-N, or pass the folders of one run as a list"


def pattern_of(name: str, number: int | None = None) -> str:
    """Replace the numbers of a name, or only the one with this index, by N: ``lora-step10`` -> ``lora-stepN``."""
    if number is None:
        return NUMBER.sub("N", name)
    match = list(NUMBER.finditer(name))[number]
    return name[: match.start()] + "N" + name[match.end() :]


def steps_in_names(names: Sequence[str], remedy: str = REMEDY) -> dict[str, tuple[int, str]]:
    """Return the step of each name, and its pattern with N for the step.

    Names that differ only in their numbers are compared: the step is the number that is unique to each name. Of several
    such numbers (``epoch1-step300``, ``epoch2-step600``) it is the one after the word step. Raises ``CheckpointError``
    where that is ambiguous.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[pattern_of(name)].append(name)
    steps: dict[str, tuple[int, str]] = {}
    for group in groups.values():
        index = _index_of_step(group, remedy)
        for name in group:
            number = list(NUMBER.finditer(name))[index]
            if MULTIPLE.match(name, number.end()):
                raise ambiguous_step(f"'{name}' is not step {number[0]}; {remedy}")
            steps[name] = int(number[0]), pattern_of(name, index)
    return steps


def _index_of_step(group: Sequence[str], remedy: str) -> int:
    """Return which of the numbers in names of one pattern is the step."""
    columns = list(zip(*([int(number) for number in NUMBER.findall(name)] for name in group), strict=True))
    unique = [i for i, column in enumerate(columns) if len(set(column)) == len(column)]
    if len({columns[i] for i in unique}) == 1:
        return unique[-1]  # one number, or the same number twice
    after_word = [i for i in unique if STEP_WORD.search(group[0][: list(NUMBER.finditer(group[0]))[i].start()])]
    if len(after_word) == 1:
        return after_word[0]
    reason = "several numbers could be the step" if unique else "no number is unique to each name"
    raise ambiguous_step(
        f"cannot tell the step of {shorten(group)}: {reason if columns else 'there is no number'}; {remedy}"
    )


def shorten(names: Iterable[str]) -> str:
    """Return the first three names for a message, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def missing_steps(steps: Sequence[int], accounted: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the steps that a regular spacing lacks (30 of 10, 20, 40), without those ``accounted`` for.

    The spacing is the most common difference of neighbours (the smallest of several). A last checkpoint off the grid,
    as trainers write at the end, is no gap; nor is there one where more steps would be missing than present.
    """
    if len(steps) < 3:
        return ()
    pairs = list(itertools.pairwise(steps))
    differences = [later - earlier for earlier, later in pairs]
    spacing = min(set(differences), key=lambda d: (-differences.count(d), d))
    gaps = [pair for pair, d in zip(pairs, differences, strict=True) if d > spacing and d % spacing == 0]
    # Counted before they are listed: between two timestamps there would be millions.
    if sum((later - earlier) // spacing - 1 for earlier, later in gaps) >= len(steps) - 1:
        return ()
    known = set(accounted)
    missing = (step for earlier, later in gaps for step in range(earlier + spacing, later, spacing))
    return tuple(step for step in missing if step not in known)

"""What a test has begun itself. Other tests of the same process leave theirs behind: a pool's tracker, a Ray."""

from collections.abc import Set

import psutil


def children() -> set[psutil.Process]:
    """Of this process, those that nobody has waited for included."""
    return set(psutil.Process().children())


def begun_since(before: Set[psutil.Process]) -> list[psutil.Process]:
    """Our children that are not in ``before``, and all who descend from them."""
    return [each for child in children() - before for each in (child, *child.children(recursive=True))]

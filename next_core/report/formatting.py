"""Numbers, counts and jumps as text."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from next_core.comparison.comparison_results import Bounds
from next_core.cycle.summary import counted as counted
from next_core.cycle.summary import without_numbers
from next_core.report.inputs import Jump

NONE = "–"
LONGEST_REASON = 240
MOST_VARIANTS = 3
"""Reasons that differ only in their numbers are listed up to this many; of more, one is shown as an example."""
Format = Callable[[float | None], str]


def decimal(value: float | None, digits: int = 3, sign: str = "") -> str:
    """Return 0.123 or −0.123; a dash for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}".replace("-", "−")


signed = partial(decimal, sign="+")
whole = partial(decimal, digits=0)
signed_whole = partial(decimal, digits=0, sign="+")
one_digit = partial(decimal, digits=1)


def seconds(value: float | None) -> str:
    """Return 12.3 s below two minutes, then minutes, then hours; what ends below 0, as an interval may, is 0."""
    if value is None or not math.isfinite(value):
        return NONE
    value = max(value, 0.0)
    size, unit = (1, "s") if value < 120 else (60, "min") if value < 7200 else (3600, "h")
    scaled = value / size
    return f"{decimal(scaled, 2 if scaled < 1 else 1 if scaled < 100 else 0)} {unit}"


def less_or_more(saved: Bounds | None, at_least: bool) -> str:
    """Return seconds saved as ``12.3 s less`` or ``12.3 s more``; where they are a lower bound, ``≥`` and ``≤``."""
    if saved is None:
        return NONE
    if abs(saved.mean) < 0.05:
        return "same or less" if at_least else "same"
    bound, words = ("≥ ", "less") if saved.mean > 0 else ("≤ ", "more")
    return f"{bound * at_least}{seconds(abs(saved.mean))} {words}"


def span(interval: Bounds | None, form: Format = decimal) -> str:
    """Return ``0.71 to 0.78`` or ``0.71 or more``; nothing where a single seed gives no interval."""
    if interval is None or interval.low is None:
        return ""
    return f"{form(interval.low)} {'or more' if interval.high is None else f'to {form(interval.high)}'}"


def with_span(interval: Bounds | None) -> str:
    """Return +0.12 (95% +0.08 to +0.16)."""
    if interval is None:
        return NONE
    between = span(interval, signed)
    return signed(interval.mean) + (f" (95% {between})" if between else "")


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return ``a, b and c``."""
    quoted = [f"“{name}”" if "," in name else name for name in names]
    shown = [*quoted[:most], f"{len(names) - most} more"] if len(names) > most else quoted
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def reasons(jumps: Sequence[Jump]) -> list[tuple[str, list[Jump]]]:
    """Group jumps by their reason, the most frequent first. Reasons that differ only in their numbers are alike."""
    groups: dict[str, list[Jump]] = {}
    for jump in jumps:
        groups.setdefault(without_numbers(jump.reason), []).append(jump)
    found = []
    for alike in groups.values():
        different = list(dict.fromkeys(jump.reason for jump in alike))
        if len(different) <= MOST_VARIANTS:
            found += [(_short(reason), [jump for jump in alike if jump.reason == reason]) for reason in different]
        else:
            found.append((f"for example: {_short(different[-1])}", alike))
    return sorted(found, key=lambda one: -len(one[1]))


def _short(reason: str) -> str:
    text = reason or "no reason was given"
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def values_text(values: Mapping[str, Any]) -> str:
    """Return ``training.learning_rate = 0.001``."""
    return ", ".join(f"{key} = {value}" for key, value in values.items()) or "as configured"


def steps_text(jumps: Sequence[Jump]) -> str:
    """Return ``50``, or ``50 to 90``; a dash without jumps."""
    steps = sorted({jump.step for jump in jumps})
    return NONE if not steps else f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])


def merged(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return rows in which equal neighbours are one; the first column, a step, becomes ``50 to 90 (5 times)``."""
    found = []
    for _, group in itertools.groupby(rows, key=lambda row: list(row[1:])):
        some = list(group)
        ends = f"{some[0][0]} to {some[-1][0]} ({len(some)} times)"
        found.append([ends if len(some) > 1 else some[0][0], *some[0][1:]])
    return found

"""Figures and jumps as words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from next_core.report.inputs import Interval, Jump

NOTHING = "–"
FIGURES = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
MOST_REASON = 240
MOST_ALIKE = 3
"""Of more reasons that differ in their figures alone an example is given."""


def figure(value: float | None, digits: int = 3) -> str:
    """0.123 or −0.123; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """+0.123 or −0.123."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value, digits) + 0.0:+,.{digits}f}".replace("-", "−")


def whole(value: float | None) -> str:
    """1,234."""
    return figure(value, 0)


def seconds(value: float | None) -> str:
    """12.3 s below two minutes, then minutes, then hours."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for bound, unit, size in ((120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600)):
        if abs(value) < bound:
            scaled = value / size
            return f"{figure(scaled, 2 if abs(scaled) < 1 else 1 if abs(scaled) < 100 else 0)} {unit}"
    raise AssertionError  # no number is above infinity


def span(interval: Interval | None, form: Any = figure) -> str:
    """The ends of an interval: ``0.71 to 0.78``, ``0.71 or more``; nothing where one seed gives none."""
    if interval is None or interval.low is None:
        return ""
    if interval.high is None:
        return f"{form(interval.low)} or more"
    return f"{form(interval.low)} to {form(interval.high)}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """a, b and c."""
    quoted = [f"“{name}”" if "," in name else name for name in names]
    shown = [*quoted[:most], f"{len(names) - most} more"] if len(names) > most else quoted
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def counted(count: int, what: str, many: str | None = None) -> str:
    """1 jump, 2 jumps."""
    return f"{count:,} {what if count == 1 else many or what + 's'}"


def reasons(jumps: Sequence[Jump]) -> list[tuple[str, list[Jump]]]:
    """Jumps by their reason, the most frequent first; many that differ in their figures alone are one."""
    groups: dict[str, list[Jump]] = {}
    for jump in jumps:
        groups.setdefault(FIGURES.sub("#", jump.reason), []).append(jump)
    told = []
    for alike in groups.values():
        different = list(dict.fromkeys(jump.reason for jump in alike))
        if len(different) <= MOST_ALIKE:
            told += [(_short(reason), [jump for jump in alike if jump.reason == reason]) for reason in different]
        else:
            told.append((f"such as: {_short(different[-1])}", alike))
    return sorted(told, key=lambda one: -len(one[1]))


def _short(reason: str) -> str:
    words = reason or "no reason was given"
    return words if len(words) <= MOST_REASON else f"{words[: MOST_REASON - 1]}…"


def settings(values: Mapping[str, Any]) -> str:
    """What was set: training.learning_rate = 0.001."""
    return ", ".join(f"{key} = {value}" for key, value in values.items()) or "as configured"


def steps_of(jumps: Sequence[Jump]) -> str:
    """step 50, or steps 50 to 90."""
    first, last = min(jump.step for jump in jumps), max(jump.step for jump in jumps)
    return f"step {first}" if first == last else f"steps {first} to {last}"


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def as_yaml(value: Mapping[str, Any]) -> str:
    """A config as one would write it."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=100)

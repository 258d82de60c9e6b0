"""What the tests of the kit share: whether a check fails, and the checks of every plug-in."""

from __future__ import annotations

from typing import Any

from next_core.testing import DoesNotApply, checks_of
from next_core.testing.check_runner import CheckedKind

COMMON = {"has_a_name", "settings_survive_a_round_trip", "settings_are_strict"}
"""The checks of every kind of plug-in; ``test_kit`` breaks them."""


def fails(check: str, kind: CheckedKind, subject: Any) -> bool:
    """Run one check on a plug-in or case that breaks it."""
    try:
        checks_of(kind)[check](subject)
    except DoesNotApply:
        return False
    except Exception:
        return True
    return False

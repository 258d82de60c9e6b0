"""What the tests of diagnostics share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from next_core.plugins import registry


@pytest.fixture
def register() -> Iterator[Callable[[type[Any]], None]]:
    """``register(predictor)`` for this test alone."""
    added = []

    def add(cls: type[Any]) -> None:
        registry().add(cls)
        added.append(cls.name)

    yield add
    for each in added:
        registry()._entries.pop(("predictor", each))

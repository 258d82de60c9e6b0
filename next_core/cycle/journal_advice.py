"""Advice at the end of a run. The function that computes it is passed in: diagnostics are a layer above the cycle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from next_core.backend import Backend
from next_core.cycle.journal import Journal
from next_core.errors import describe
from next_core.interfaces import CheckpointSource

Advise = Callable[[CheckpointSource, Sequence[Mapping[str, Any]]], str | None]
"""From a run's checkpoints and its journalled jumps to one sentence, or None when there is nothing to advise."""


def journal_advice(advise: Advise | None, backend: Backend, journal: Journal, step: int) -> str | None:
    """Return the advice after ``step`` and journal it. A failure is journalled too: it must not fail the run."""
    if advise is None:
        return None
    source = backend.source()  # raises here at the latest if a checkpoint could not be written
    try:
        text = advise(source, journal.jumps())
    except Exception as error:
        journal.append("advice", step, problem=describe(error))
        return None
    if text is not None:
        journal.append("advice", step, text=text)
    return text

"""Makes the decisions of a run visible: figures next to the trainer's own metrics, and warnings."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from next_core.backend import Backend
from next_core.cycle.journal import Journal
from next_core.cycle.scaling import EVENTS
from next_core.cycle.summary import without_numbers

PREFIX = "next_core/"
FIGURES = ("multiple", "agreement", "norm_ratio", "accepted", "accuracy_before", "accuracy_after")
"""What is shown of a decision, from its journal record or its diagnostics."""
DECISIONS = (*EVENTS, "jump", "verify", "average")


class Decisions:
    """Shows what the journal gained since it last looked, and warns of the first refusal of each kind.

    Reasons that differ only in their numbers are of one kind. Later ones are counted by the summary of the run.
    """

    def __init__(self, journal: Journal, backend: Backend) -> None:
        self._journal, self._backend = journal, backend
        self._seen, self._seconds = len(journal.records), 0.0
        self._warned: set[str] = set()

    def show(self, seconds: float) -> None:
        """Show the new decisions; ``seconds`` is what next-core has taken since training began."""
        new = [record for record in self._journal.records[self._seen :] if record["event"] in DECISIONS]
        self._seen = len(self._journal.records)
        for record in new:
            self._warn(record)
            self._backend.show(figures(record) | {f"{PREFIX}seconds": seconds - self._seconds})
            self._seconds = seconds

    def _warn(self, record: Mapping[str, Any]) -> None:
        event, step = record["event"], record["step"]
        if event == "collapse":
            reason = (
                f"the reward fell to {record['reward']:.3g} from {record['best']:.3g}; back to step {record['back_to']}"
            )
        elif event == "average" or record["accepted"]:
            return
        else:
            what = {"jump": "no jump", "scale": "no new multiple", "verify": "the jump did not recover"}[event]
            reason = f"{what}: {record['reason']}"
        kind = without_numbers(reason)
        if kind not in self._warned:
            self._warned.add(kind)
            logging.getLogger(__name__).warning("step %d: %s (more of this kind are only counted)", step, reason)


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite figures of a decision, as a tracker takes them."""
    diagnostics = record.get("diagnostics") or {}
    known = {name: record.get(name, diagnostics.get(name)) for name in FIGURES}
    if record["event"] == "verify":
        known["accuracy_after"] = record["accuracy"]
    elif record["event"] == "average":
        tried = [value for value in record["tried"].values() if value is not None]
        known["accuracy_after"] = max(tried, default=None)
    return {f"{PREFIX}{name}": float(x) for name, x in known.items() if x is not None and math.isfinite(x)}

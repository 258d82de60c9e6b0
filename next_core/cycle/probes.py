"""Probes: the accuracy that guards judge a jump by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from next_core.backend import Backend
from next_core.cycle.journal import Journal
from next_core.cycle.measurements import Stopwatch
from next_core.errors import describe


class Probes:
    """Accuracy on the validation prompts, journalled at each measurement.

    A probe that fails, or is not finite, is journalled with the problem and returned as None: it may be third-party
    code and must not end the run. ``enabled`` is the guards' setting; without it only ``measure(always=True)``
    measures.
    """

    def __init__(self, backend: Backend, journal: Journal, enabled: bool, watch: Stopwatch) -> None:
        self._backend, self._journal, self._enabled, self._watch = backend, journal, enabled, watch
        self._known: dict[int, float] = {}

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Remember what was measured before a resume: of each step the first, which no jump had changed yet."""
        for record in records:
            if record["event"] == "probe" and record["accuracy"] is not None:
                self._known.setdefault(record["step"], record["accuracy"])

    def at(self, step: int) -> float | None:
        """Return the accuracy after ``step``, measured at most once."""
        if self._enabled and step in self._known:
            return self._known[step]
        accuracy = self.measure(step)
        if accuracy is not None:
            self._known[step] = accuracy
        return accuracy

    def measure(self, step: int, *, always: bool = False) -> float | None:
        """Measure the weights as they are now."""
        if not self._enabled and not always:
            return None
        problem = None
        with self._watch:
            try:
                found = self._backend.evaluate()
                accuracy = None if found is None else float(found)  # it may be a tensor
            except Exception as error:
                accuracy, problem = None, describe(error)
        if accuracy is not None and not math.isfinite(accuracy):
            accuracy, problem = None, f"the accuracy is {accuracy}"
        if accuracy is not None or problem is not None:
            self._journal.append("probe", step, accuracy=accuracy, **({"problem": problem} if problem else {}))
        return accuracy

    def slope(self, step: int, accuracy: float, window: int) -> float:
        """Return the trend of accuracy per RL step over the ``window`` steps before ``step``; 0 if it is unknown."""
        then = self._known.get(step - window)
        return 0.0 if then is None else (accuracy - then) / window

"""What a trainer promises to the predict-extend cycle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from next_core.interfaces import Applied, CheckpointSource, Prediction
from next_core.run_config import RunConfig
from next_core.types import Plugin


class Backend(Plugin):
    """A trainer, as the predict-extend cycle sees it."""

    in_process: ClassVar[bool] = True
    """True: one call of ``train`` reports every step. False: ``train`` is called once per segment."""
    exact_resume: ClassVar[bool] = False
    """Whether a resumed run ends, on a CPU, bit for bit where the run that was not interrupted does."""

    @abstractmethod
    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Build the trainer of a run config, working in ``out``. Returns the step to go on from, 0 for a new run.

        Raises ``ConfigError`` or ``BackendError`` for what the trainer cannot do.
        """

    def start(self) -> None:
        """Start a trainer that is a process of its own, once after ``prepare``: it may take minutes."""

    @abstractmethod
    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        """Train up to and including RL step ``until``, calling ``step_ended(step)`` after each step it can report."""

    def stop(self) -> None:
        """Let ``train`` return early: at the next step that a resumed run goes on from as if it had not ended there.

        Asked for at the end of a step, by an in-process trainer's user; one that cannot is ended at once.
        """
        raise KeyboardInterrupt

    @abstractmethod
    def observe(self, step: int) -> None:
        """Make the weights of the step that just ended available as a checkpoint of ``source()``."""

    @abstractmethod
    def source(self) -> CheckpointSource:
        """The checkpoints so far, shifted by the jumps that were made: what RL did, not what we did."""

    @abstractmethod
    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        """Give the trainer the extrapolated weights, at a point where it holds no roll-outs of the old ones.

        What it returns puts weights and optimizer state back, also after further steps; with ``keep`` a resumed run
        can do so too (``standing``).
        """

    @abstractmethod
    def rollback(self, applied: Applied, step: int) -> None:
        """Put back what was there before a jump, after ``step`` ended.

        At the jump's own step it is as if it had not been made; later, the checkpoints since are of a path that was
        left, and the history starts anew at ``step``.
        """

    def active_jump(self, step: int) -> Applied | None:
        """The jump made after ``step``, as a resumed run finds it; None where its undoing was not kept."""
        return None

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        """Accuracy in [0, 1] on held-out prompts; None where there is nothing to measure with."""
        return None

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        """The same by the way of answering, ``sampled`` or ``greedy``; empty where there is nothing to measure with."""
        found = self.evaluate(split)
        return {} if found is None else {"sampled": found}

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how the run was observed, such as the precision of its checkpoints."""
        return ()

    def close(self) -> None:
        """End what still runs, when the run is over or has failed; before ``prepare``, and again, it does nothing."""

    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        """Facts for a dry run as plain values, such as the command line that would be started; nothing is started."""
        return {}

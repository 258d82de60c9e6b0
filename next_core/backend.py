"""The interface of a trainer, as the predict-extend cycle uses it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from next_core.errors import unsupported
from next_core.interfaces import Applied, CheckpointSource, Prediction
from next_core.interfaces.trainer_steps import TrainerSteps
from next_core.run_config import RunConfig
from next_core.types import Plugin, Space


@dataclass(frozen=True)
class LoggedReward:
    """The mean reward over the ``steps`` RL steps that end with ``step``, and its standard error."""

    step: int
    steps: int
    mean: float
    error: float


class Backend(Plugin):
    """A trainer that the predict-extend cycle drives."""

    in_process: ClassVar[bool] = True
    """True: one call of ``train`` reports every step. False: ``train`` is called once per segment."""
    exact_resume: ClassVar[bool] = False
    """Whether a resumed run ends, on a CPU, with the same bits as the uninterrupted run."""

    scales_steps: ClassVar[bool] = False
    """Whether the trainer's optimizer can be reached, so that its steps can be multiplied."""
    forgets: ClassVar[bool] = False
    """Whether checkpoints can be deleted while the run goes on: ``forget`` and ``reopen`` are there."""

    @abstractmethod
    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Build the trainer of a run config in ``out``. Returns the step to resume at, 0 for a new run.

        Raises ``ConfigError`` or ``BackendError`` for what the trainer cannot do.
        """

    def check_jumps(self, space: Space | None) -> None:
        """Raise ``BackendError``, before training begins, if no jump in this space (None: unknown) can ever be made."""

    def follow_steps(self, windows: Sequence[int]) -> None:
        """Give access to the trainer's ``steps`` once training begins, with running means over ``windows`` steps.

        Then no checkpoint is taken. Raises ``BackendError`` where the optimizer cannot be reached.
        """
        raise unsupported(f"backend '{self.name}' cannot scale the steps of its trainer; choose a predictor that jumps")

    @property
    def steps(self) -> TrainerSteps:
        """The steps of a trainer that was asked to ``follow_steps``, while it trains."""
        raise NotImplementedError

    def rewards(self) -> Sequence[LoggedReward]:
        """Return the rewards that the trainer has logged so far, in order."""
        return ()

    def takes_weights(self, step: int) -> bool:
        """Whether weights may change after ``step``: the trainer holds no roll-outs of the old ones."""
        return True

    def start(self) -> None:
        """Start a trainer that is a process of its own, once, after ``prepare``. It may take minutes."""

    @abstractmethod
    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        """Train up to and including RL step ``until``, calling ``step_ended(step)`` after each step it can report."""

    def stop(self) -> None:
        """Make ``train`` return early, at the next step from which a resumed run ends as the uninterrupted one does.

        Called at the end of a step of an in-process trainer. The default raises ``KeyboardInterrupt``, which ends the
        trainer at once.
        """
        raise KeyboardInterrupt

    @abstractmethod
    def observe(self, step: int) -> None:
        """Make the weights of the step that just ended available as a checkpoint of ``source()``."""

    @abstractmethod
    def source(self) -> CheckpointSource:
        """Return the checkpoints so far, with the jumps subtracted: what RL did, not what we did."""

    def forget(self, step: int, kept: Callable[[int, Sequence[int]], Sequence[range]]) -> None:
        """Delete checkpoints and jumps that are not needed after ``step``, without one that a crash may make needed.

        ``kept(step, saves)`` returns the ranges of steps to keep, with the steps of the trainer's own checkpoints, from
        which the run can be resumed. Those in the first range are the run's history; ``source`` does not show the
        others.
        """
        raise NotImplementedError

    def reopen(self, steps: range, every: int) -> None:
        """Make these steps the history of a run that is resumed at the last of them, after ``forget``.

        Raises ``CheckpointError`` if one of the checkpoints, ``every`` steps apart, was deleted.
        """

    @abstractmethod
    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        """Give the trainer the extrapolated weights, at a step where it holds no roll-outs of the old ones.

        The result restores weights and optimizer state, also after further steps. With ``keep`` a resumed run can
        restore them too, through ``active_jump``.
        """

    @abstractmethod
    def rollback(self, applied: Applied, step: int) -> None:
        """Restore the weights and optimizer state from before a jump, after ``step`` ended.

        At the jump's own step this leaves no trace. Later, the checkpoints since the jump belong to an abandoned path,
        and the history starts again at ``step``.
        """

    def active_jump(self, step: int) -> Applied | None:
        """Return the jump made after ``step``, for a resumed run; None if it was not kept."""
        return None

    @property
    def measures(self) -> bool:
        """Whether ``evaluate`` may return an accuracy. Where it never does, no mean is compared at the end."""
        return True

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        """Return the accuracy in [0, 1] on held-out prompts; None without such prompts."""
        return None

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        """Return accuracies by decoding, ``sampled`` or ``greedy``; empty without such prompts."""
        found = self.evaluate(split)
        return {} if found is None else {"sampled": found}

    def show(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a decision after the current step to what the trainer logs, if it has a log."""

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for the user on how the run was observed, such as the precision of its checkpoints."""
        return ()

    def close(self) -> None:
        """Stop the trainer when the run is over or has failed. May be called before ``prepare``, and again."""

    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        """Return facts for a dry run as plain values, such as the command line; start nothing."""
        return {}

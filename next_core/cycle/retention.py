"""Which checkpoints and jumps of a run will be read again; with ``keep: needed`` the others are deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from next_core.predictor import TrajectoryPredictor
from next_core.run_config import Guards, Schedule


@dataclass(frozen=True)
class Retention:
    """What is read after a step: by later jumps, an open recovery window and the mean at the end.

    ``reads`` is how many steps before a jump the oldest checkpoint lies that it reads; None if it reads them all.
    """

    schedule: Schedule
    guards: Guards
    total: int
    reads: int | None

    @classmethod
    def of(cls, predictor: TrajectoryPredictor, schedule: Schedule, guards: Guards, total: int) -> Self:
        reads = predictor.reads_back(schedule.horizon, schedule.every)
        if reads is not None:
            # The cycle compares a jump with the motion of the last ``horizon`` steps, and a history finds the matrices
            # that move by the checkpoint before the newest. Both begin at a checkpoint.
            reads = -(-max(reads, schedule.horizon, 1) // schedule.every) * schedule.every
        return cls(schedule, guards, total, reads)

    def oldest(self, step: int) -> int:
        """Return the oldest step that is read after ``step``, where the run goes on or is resumed; at most ``step``."""
        oldest, jump = step, self.schedule.next_attempt(step, self.total)
        if jump is not None:
            oldest = 0 if self.reads is None else min(oldest, jump - self.reads)
        if self.schedule.average is not None and step < self.total:
            oldest = min(oldest, self.total - self.schedule.average + 1)
        if self.guards.recovery is not None:
            oldest = min(oldest, step - self.guards.recovery)
        return max(oldest, 0)

    def kept(self, step: int, saves: Sequence[int]) -> list[range]:
        """Return the steps to keep after ``step``, then those for a resume from each of the trainer's ``saves``."""
        return [range(self.oldest(at), at + 1) for at in (step, *saves)]

    def most(self, jumps: Sequence[int], saves: Sequence[int]) -> tuple[int, int]:
        """Return how many checkpoints, and how many of these ``jumps``, the run keeps at most at a time.

        ``saves`` are the steps of the trainer's checkpoints, all of which stay. Most are there at a jump or at the end,
        and step 0 may be one of them.
        """
        every, checkpoints, kept_jumps = self.schedule.every, 0, 0
        for step in {*jumps, self.total - 1, self.total}:
            before = self.kept(max(step - 1, 0), [at for at in saves if at < step])
            there = {at for steps in before for at in range(-(-steps.start // every) * every, steps.stop, every)}
            checkpoints = max(checkpoints, len({0, step} | there))
            kept_jumps = max(kept_jumps, sum(any(at in steps for steps in before) for at in jumps if at < step) + 1)
        return checkpoints, min(kept_jumps, len(jumps))

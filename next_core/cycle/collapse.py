"""Whether a run's reward has collapsed, given the sampling error of what the trainer logs."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from next_core.backend import LoggedReward

RECENT = (4, 12, 36)
"""RL steps over which the recent reward is a mean: a rare reward needs many roll-outs to be missed."""
BEST = 15
"""RL steps over which the best reward is a mean."""
ERRORS = 3.2
"""Standard errors below the best that are no chance, although the best is the luckiest of many means."""
LOST = 0.25
"""The part of the best reward that must be lost."""
SPREAD = 1.25
"""Prompts differ in difficulty: means of different prompts vary more than those of one prompt's roll-outs."""


@dataclass(frozen=True)
class RewardTrend:
    """The mean reward of the last steps, the best mean before them, and the standard error of their difference."""

    recent: float
    best: float
    error: float
    begins: int
    """The step before the first of the last steps: the weights that earned the recent reward are no older."""

    @property
    def collapsed(self) -> bool:
        """Whether the recent reward is below the best by more than its error and a part of it explain."""
        return self.short(ERRORS) and self.recent < self.best - LOST * abs(self.best)

    def short(self, errors: float) -> bool:
        """Whether the recent reward is below the best by more than this many standard errors."""
        return self.recent < self.best - errors * self.error


class RewardHistory:
    """The rewards that count, and the means that they are judged by; a record takes O(log n) steps.

    ``abandoned``: pairs (back_to, step); the weights of the steps between were replaced by those of ``back_to``. Their
    rewards do not count: the weights that the run returned to may never have earned as much.
    """

    def __init__(self, abandoned: Sequence[tuple[int, int]] = ()) -> None:
        self._abandoned = abandoned
        self._since = max((step for _, step in abandoned), default=0)
        self._ends: list[int] = []
        """The step that each record ends with."""
        self._steps, self._earned, self._variance = [0], [0.0], [0.0]
        """Sums over the records before: RL steps, rewards, and squared errors of sums of rewards."""
        self._best: list[tuple[float, int, int]] = []
        """The best window that ends with each record or an earlier one: its mean, and the records it is from and to."""

    def add(self, reward: LoggedReward) -> None:
        """Take a record that the trainer logged after those before."""
        begin = reward.step - reward.steps
        if any(back < reward.step and begin < step for back, step in self._abandoned):
            return
        self._ends.append(reward.step)
        self._steps.append(self._steps[-1] + reward.steps)
        self._earned.append(self._earned[-1] + reward.mean * reward.steps)
        self._variance.append(self._variance[-1] + (reward.error * reward.steps) ** 2)
        last = len(self._ends)
        first = self._first(BEST) or 0
        long_enough = self._steps[last] - self._steps[first] >= RECENT[0]
        found = (self._mean(first, last) if long_enough else -math.inf, first, last)
        self._best.append(max(self._best[-1], found, key=lambda window: window[0]) if self._best else found)

    def trends(self) -> list[RewardTrend]:
        """Compare the last rewards with the best before them, over each of ``RECENT`` steps."""
        trends, last = [], len(self._ends)
        for first in filter(None, map(self._first, RECENT)):
            covered = self._steps[last] - self._steps[first]
            begins = self._ends[first] - (self._steps[first + 1] - self._steps[first])
            before = bisect_right(self._ends, begins)
            if begins < self._since or not before or self._best[before - 1][0] == -math.inf:
                continue
            best, start, end = self._best[before - 1]
            steps = self._steps[end] - self._steps[start]
            # The spread of single roll-outs, from the best window: once all fail, their own says nothing.
            spread = SPREAD * math.sqrt((self._variance[end] - self._variance[start]) / steps)
            error = spread * math.sqrt(1 / covered + 1 / steps)
            trends.append(RewardTrend(self._mean(first, last), best, error, begins))
        return trends

    def _first(self, steps: int) -> int | None:
        """Return the first of the fewest last records that cover ``steps`` RL steps."""
        return bisect_right(self._steps, self._steps[-1] - steps) - 1 if self._steps[-1] >= steps else None

    def _mean(self, first: int, last: int) -> float:
        return (self._earned[last] - self._earned[first]) / (self._steps[last] - self._steps[first])

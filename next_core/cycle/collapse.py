"""Whether a run's reward has collapsed, given the sampling error of what the trainer logs."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from next_core.backend import LoggedReward

RECENT = (4, 12, 36)  # RL steps over which the recent reward is a mean: a rare reward needs many roll-outs to be missed
BEST = 15  # RL steps over which the best reward is a mean
LUCKY = 15
"""The last steps are compared with the luckiest of many means: as if there had been this many times as many looks."""
LOST = 0.25  # The part of the best reward that must be lost
CLUSTERED, AS_PAIRS = 4.0, 4
"""The clustering as long as little is known, and the number of pairs of records that this counts as."""


@dataclass(frozen=True)
class RewardTrend:
    """The mean reward of the last steps, the best mean before them, and the standard error of their difference."""

    recent: float
    best: float
    error: float
    begins: int
    """The step before the first of the last steps: the weights that earned the recent reward are no older."""
    looks: int
    """How often chance could have looked like a collapse already."""

    @property
    def collapsed(self) -> bool:
        """Whether the recent reward is below the best by more than chance and a part of it explain.

        At look n, chance may reach it with a probability of 1 / (60 (n + 1)), so that few of all looks are wrong.
        """
        errors = math.sqrt(2 * math.log(60 * (self.looks + 1)))
        return self.short(errors) and self.recent < self.best - LOST * abs(self.best)

    def short(self, errors: float) -> bool:
        """Whether the recent reward is below the best by more than this many standard errors."""
        return self.recent < self.best - errors * self.error


class RewardHistory:
    """The rewards that count, and the means that they are judged by; a record takes O(log n) steps.

    ``abandoned``: pairs (back_to, step); the weights of the steps between were replaced by those of ``back_to``. Their
    rewards do not count: the weights that the run returned to may never have earned as much. A record of other steps
    too does: that of the first step after ``back_to`` was earned by these weights.
    """

    def __init__(self, abandoned: Sequence[tuple[int, int]] = ()) -> None:
        self._abandoned = abandoned
        self._since = max((step for _, step in abandoned), default=0)
        self._ends: list[int] = []  # The step that each record ends with
        self._steps, self._earned, self._variance = [0], [0.0], [0.0]
        """Sums over the records before: RL steps, rewards, and squared errors of sums of rewards."""
        self._apart, self._expected = [0.0], [0.0]
        """Sums over pairs of successive records: their squared difference, and what independent roll-outs give.

        Twice the square of each rise counts instead, as a fall may be the collapse.
        """
        self._newest: LoggedReward | None = None
        self._silent = 0  # The last records in each of which all roll-outs earned the same
        self._best: list[tuple[float, int, int]] = []
        """The best window that ends with each record or an earlier one: its mean, and the records it is from and to."""

    def add(self, reward: LoggedReward) -> None:
        """Take a record that the trainer logged after those before."""
        begin = reward.step - reward.steps
        if any(back < begin and reward.step <= step for back, step in self._abandoned):
            return
        self._ends.append(reward.step)
        self._steps.append(self._steps[-1] + reward.steps)
        self._earned.append(self._earned[-1] + reward.mean * reward.steps)
        self._variance.append(self._variance[-1] + (reward.error * reward.steps) ** 2)
        before = self._newest or reward
        self._apart.append(self._apart[-1] + 2 * max(reward.mean - before.mean, 0) ** 2)
        self._expected.append(self._expected[-1] + (0 if before is reward else reward.error**2 + before.error**2))
        self._newest = reward
        self._silent = self._silent + 1 if reward.error <= 1e-6 * abs(reward.mean) else 0
        last = len(self._ends)
        first = self._first(BEST) or 0
        long_enough = self._steps[last] - self._steps[first] >= RECENT[0]
        found = (self._mean(first, last) if long_enough else -math.inf, first, last)
        self._best.append(max(self._best[-1], found, key=lambda window: window[0]) if self._best else found)

    def trends(self) -> list[RewardTrend]:
        """Compare the last rewards with the best before them, over each of ``RECENT`` steps and over silent steps."""
        trends, last = [], len(self._ends)
        for first in filter(None, map(self._first, RECENT)):
            covered, begins = self._steps[last] - self._steps[first], self._begins(first)
            before = bisect_right(self._ends, begins)
            if begins < self._since or not before or self._best[before - 1][0] == -math.inf:
                continue
            best, start, end = self._best[before - 1]
            steps = self._steps[end] - self._steps[start]
            # Of the steps before: once all fail, the last ones say nothing. The luckiest window varies least of all.
            lucky = (self._variance[end] - self._variance[start]) / steps
            usual = self._variance[before] / self._steps[before]
            error = math.sqrt(self.clustering(before) * max(lucky, usual) * (1 / covered + 1 / steps))
            trends.append(RewardTrend(self._mean(first, last), best, error, begins, LUCKY * before))
        return trends + self._silence()

    def _silence(self) -> list[RewardTrend]:
        """Compare silent last steps with all before them.

        Where few roll-outs succeed, none of many is far less likely than the standard error of the few says. Of n
        successes, all fall into the first of the steps with probability (before / all steps) ** n; the error is the
        difference over the normal deviate of this chance.
        """
        last = len(self._ends)
        first = last - self._silent
        if first in (0, last) or self._begins(first) < self._since:
            return []
        recent, before = self._mean(first, last), self._mean(0, first)
        gained = (before - recent) * self._steps[first]
        if gained <= 0:
            return []
        successes = gained**2 / (self.clustering(first) * self._variance[first])
        deviate = math.sqrt(2 * successes * math.log(self._steps[last] / self._steps[first]))
        return [RewardTrend(recent, before, (before - recent) / deviate, self._begins(first), first)]

    def mean_after(self, step: int, until: int) -> float | None:
        """Return the mean reward of the records that end after ``step``, until a later one; None without a record."""
        first, last = bisect_right(self._ends, step), bisect_right(self._ends, until)
        return self._mean(first, last) if first < last else None

    def clustering(self, records: int) -> float:
        """Return how much larger the variance of mean rewards is than that of independent roll-outs: at least 1.

        Roll-outs of one prompt succeed or fail together: with 8 of each prompt the ratio was 4 to 8 on a language
        model, and about 1 on the example tasks. It is estimated from the rises between the first records.
        """
        apart, expected = self._apart[records], self._expected[records]
        assumed = AS_PAIRS * expected / max(records - 1, 1)
        return max(1.0, (apart + CLUSTERED * assumed) / (expected + assumed)) if expected else CLUSTERED

    def _begins(self, record: int) -> int:
        """Return the step before a record."""
        return self._ends[record] - (self._steps[record + 1] - self._steps[record])

    def _first(self, steps: int) -> int | None:
        """Return the first of the fewest last records that cover ``steps`` RL steps."""
        return bisect_right(self._steps, self._steps[-1] - steps) - 1 if self._steps[-1] >= steps else None

    def _mean(self, first: int, last: int) -> float:
        return (self._earned[last] - self._earned[first]) / (self._steps[last] - self._steps[first])

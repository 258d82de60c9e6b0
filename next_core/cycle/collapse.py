"""Whether a run's reward has collapsed, given the sampling error of what the trainer logs."""

from __future__ import annotations

import math
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


def reward_trends(logged: Sequence[LoggedReward], abandoned: Sequence[tuple[int, int]] = ()) -> list[RewardTrend]:
    """Compare the last rewards with the best before them, over each of ``RECENT`` steps.

    ``abandoned``: pairs (back_to, step); the weights of the steps between were replaced by those of ``back_to``. Their
    rewards do not count: the weights that the run returned to may never have earned as much.
    """
    rewards = [one for one in logged if not any(back < one.step and _begin(one) < step for back, step in abandoned)]
    since = max((step for _, step in abandoned), default=0)
    # A record covers a step or more, so that a window has at most BEST of them.
    until = (rewards[max(0, end - BEST) : end] for end in range(1, len(rewards) + 1))
    windows = [_last(some, BEST) or some for some in until]
    trends = []
    for recent in filter(None, (_last(rewards, steps) for steps in RECENT)):
        begins = _begin(recent[0])
        earlier = [window for window in windows if window[-1].step <= begins and _steps(window) >= RECENT[0]]
        if begins < since or not earlier:
            continue
        best = max(earlier, key=_mean)
        # The spread of single roll-outs, from the best window: once all fail, their own says nothing.
        spread = SPREAD * math.sqrt(sum((one.error * one.steps) ** 2 for one in best) / _steps(best))
        error = spread * math.sqrt(1 / _steps(recent) + 1 / _steps(best))
        trends.append(RewardTrend(_mean(recent), _mean(best), error, begins))
    return trends


def _last(rewards: Sequence[LoggedReward], steps: int) -> Sequence[LoggedReward] | None:
    """Return the fewest last records that cover ``steps`` RL steps."""
    covered = 0
    for index in range(len(rewards) - 1, -1, -1):
        covered += rewards[index].steps
        if covered >= steps:
            return rewards[index:]
    return None


def _begin(reward: LoggedReward) -> int:
    """Return the step before the first that a record covers."""
    return reward.step - reward.steps


def _steps(rewards: Sequence[LoggedReward]) -> int:
    return sum(one.steps for one in rewards)


def _mean(rewards: Sequence[LoggedReward]) -> float:
    return sum(one.mean * one.steps for one in rewards) / _steps(rewards)

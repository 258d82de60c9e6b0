"""What a backtest replays: the run, the steps it predicts from, and the random walks that it is compared with."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from next_core.errors import CheckpointError, ConfigError
from next_core.interfaces import CheckpointSource
from next_core.sources.replay import Course, Jumps, Past, Signs, factor_jumps
from next_core.types import Span


@dataclass(frozen=True)
class BacktestInputs:
    """A run (draw 0) and its walks (draws 1 to ``draws``), each to be predicted from ``cuts``, ``horizon`` steps ahead.

    ``steps`` are all observed ones; ``jumps`` those of the run folder that moved LoRA factors.
    """

    source: CheckpointSource
    steps: tuple[int, ...]
    cuts: tuple[int, ...]
    horizon: int
    draws: int
    seed: int
    jumps: Jumps = field(default=(), repr=False)

    @property
    def moments(self) -> tuple[int, ...]:
        """The observed steps after 0."""
        return tuple(step for step in self.steps if step > 0)

    @property
    def course(self) -> Course:
        """What LoRA factors are sums of."""
        return Course(self.moments, tuple(step for step, _ in self.jumps))

    def signs(self, draw: int) -> Signs | None:
        """None for the run itself."""
        return Signs(self.seed, draw, self.moments) if draw else None

    def past(self, draw: int, until: int) -> Past:
        """The run or a walk, as it stood at a step."""
        return Past(self.source, until, self.signs(draw), self.jumps)

    def seen(self, cut: int) -> tuple[int, ...]:
        """The steps observed up to a cut."""
        return tuple(step for step in self.steps if step <= cut)

    def increments(self, until: int) -> list[Span]:
        """The motion between neighbouring checkpoints up to a step, the first since RL began."""
        return list(zip((seen := self.seen(until)), (None, *seen), strict=False))

    def contrasts(self, cut: int) -> Tensor:
        """The increments up to a cut, and the motion to be predicted from there, as sums of all increments.

        (n + 1, N): n increments up to the cut, of N in all.
        """
        count = len(self.seen(cut))
        ahead = torch.tensor([float(cut < step <= cut + self.horizon) for step in self.steps], dtype=torch.float64)
        return torch.cat([torch.eye(len(self.steps), dtype=torch.float64)[:count], ahead[None]])

    @property
    def block(self) -> int:
        """How many neighbouring cuts look at overlapping motion."""
        gaps = [after - before for before, after in itertools.pairwise(self.cuts)]
        return max(1, -(-self.horizon // int(statistics.median(gaps)))) if gaps else 1


def make_setting(
    source: CheckpointSource, horizon: int | None, cuts: int | None, draws: int, seed: int, steps: Sequence[int]
) -> BacktestInputs:
    """Choose what was left open. Raises ``ConfigError`` for what cannot be, ``CheckpointError`` for too short a run."""
    if horizon is not None and horizon < 1:
        raise ConfigError(f"horizon must be at least 1 RL step (got {horizon})")
    if cuts is not None and cuts < 1:
        raise ConfigError(f"cuts must be at least 1 (got {cuts})")
    if draws < 0 or draws == 1:
        raise ConfigError(f"draws must be 0 (no null) or at least 2, for an interval (got {draws})")
    if len([step for step in steps if step > 0]) < 2:
        raise CheckpointError(f"a backtest needs at least 2 checkpoints after step 0 (got {len(steps)})")
    chosen = default_horizon(steps) if horizon is None else horizon
    every = cuts_of(steps, chosen)
    if not every:
        there = ", ".join(map(str, sorted({b - a for a, b in itertools.combinations(steps, 2) if a > 0})))
        raise ConfigError(f"no two checkpoints lie {chosen} steps apart; horizons that are: {there}")
    if cuts is not None and cuts < len(every):
        stride = len(every) // cuts
        every = every[::-stride][:cuts][::-1]
    return BacktestInputs(source, tuple(steps), every, chosen, draws, seed, factor_jumps(source))


def cuts_of(steps: Sequence[int], horizon: int) -> tuple[int, ...]:
    """The observed steps after 0 from which ``horizon`` steps ahead was observed too."""
    return tuple(step for step in steps if step > 0 and step + horizon in steps)


def default_horizon(steps: Sequence[int]) -> int:
    """Of the horizons of at least twice the usual spacing the one with most cuts, the shortest of equals.

    One step of the grid ahead is the easiest to predict and says least of a jump. Where no horizon is as long, all are
    candidates.
    """
    moments = [step for step in steps if step > 0]
    spacing = statistics.median(after - before for before, after in itertools.pairwise(moments))
    every = {after - before for before, after in itertools.combinations(moments, 2)}
    long = {horizon for horizon in every if horizon >= 2 * spacing}
    return min(long or every, key=lambda horizon: (-len(cuts_of(steps, horizon)), horizon))

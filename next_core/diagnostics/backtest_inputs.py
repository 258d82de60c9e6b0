"""What a backtest replays: the run, the steps it predicts from and how far ahead."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from next_core.errors import CheckpointError, ConfigError
from next_core.interfaces import CheckpointSource
from next_core.sources.source_views import RandomWalk
from next_core.types import Span


@dataclass(frozen=True)
class BacktestInputs:
    """A run, predicted ``horizon`` steps ahead from each of ``cuts``, and ``draws`` random walks of it likewise.

    ``steps`` are all observed ones.
    """

    source: CheckpointSource
    steps: tuple[int, ...]
    cuts: tuple[int, ...]
    horizon: int
    draws: int
    seed: int

    @property
    def jumps(self) -> bool:
        """Whether later jumps moved the checkpoints before them: the same delta then differs from cut to cut."""
        return self.source.as_of(self.cuts[0]) is not self.source

    def run(self, draw: int) -> CheckpointSource:
        """Return the run itself for draw 0, else one of its random walks."""
        return RandomWalk(self.source, self.seed, draw) if draw else self.source

    def increments(self, until: int) -> list[Span]:
        """Return the spans between neighbouring checkpoints up to a step; the first counts from where RL began."""
        seen = [step for step in self.steps if step <= until]
        return list(zip(seen, (None, *seen), strict=False))

    def contrasts(self, cut: int) -> Tensor:
        """Return each increment up to a cut, and the motion that followed, as sums of all N increments: (n + 1, N)."""
        ahead = torch.tensor([float(cut < step <= cut + self.horizon) for step in self.steps], dtype=torch.float64)
        return torch.cat([torch.eye(len(self.steps), dtype=torch.float64)[: len(self.increments(cut))], ahead[None]])

    @property
    def block(self) -> int:
        """How many neighbouring cuts predict overlapping motion."""
        gaps = [after - before for before, after in itertools.pairwise(self.cuts)]
        return max(1, -(-self.horizon // int(statistics.median(gaps)))) if gaps else 1


def make_inputs(
    source: CheckpointSource, steps: Sequence[int], horizon: int | None, cuts: int | None, draws: int, seed: int
) -> BacktestInputs:
    """Fill in what was left open. Raises ``ConfigError`` for wrong settings, ``CheckpointError`` for a short run."""
    if horizon is not None and horizon < 1:
        raise ConfigError(f"horizon must be at least 1 RL step (got {horizon})", kind="config-invalid-value")
    if cuts is not None and cuts < 1:
        raise ConfigError(f"cuts must be at least 1 (got {cuts})", kind="config-invalid-value")
    if draws < 0 or draws == 1:
        raise ConfigError(
            f"draws must be 0 (no null) or at least 2, for an interval (got {draws})", kind="config-invalid-value"
        )
    if len([step for step in steps if step > 0]) < 2:
        raise CheckpointError(
            f"a backtest needs at least 2 checkpoints after step 0 (got {len(steps)})", kind="checkpoint-too-few"
        )
    chosen = default_horizon(steps) if horizon is None else horizon
    every = cuts_of(steps, chosen)
    if not every:
        there = ", ".join(map(str, sorted({b - a for a, b in itertools.combinations(steps, 2) if a > 0})))
        raise ConfigError(
            f"no two checkpoints are {chosen} steps apart; choose a horizon of {there}", kind="config-invalid-value"
        )
    if cuts is not None and cuts < len(every):
        every = every[:: -(len(every) // cuts)][:cuts][::-1]  # evenly spaced, back from the last
    return BacktestInputs(source, tuple(steps), every, chosen, draws, seed)


def cuts_of(steps: Sequence[int], horizon: int) -> tuple[int, ...]:
    """Return the observed steps after 0 that have a checkpoint ``horizon`` steps later."""
    return tuple(step for step in steps if step > 0 and step + horizon in steps)


def default_horizon(steps: Sequence[int]) -> int:
    """Return the horizon with most cuts among those of at least twice the usual spacing; of equals the shortest.

    Predicting one checkpoint ahead is easiest and says least about a jump. Where no horizon is that long, any will do.
    """
    moments = [step for step in steps if step > 0]
    spacing = statistics.median(after - before for before, after in itertools.pairwise(moments))
    every = {after - before for before, after in itertools.combinations(moments, 2)}
    long = {horizon for horizon in every if horizon >= 2 * spacing}
    return min(long or every, key=lambda horizon: (-len(cuts_of(steps, horizon)), horizon))

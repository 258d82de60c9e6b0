"""What a backtest replays: a run or a random walk of it, as it stood at a step, and the motion that followed."""

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from next_core.errors import CheckpointError, GuardError, invalid_value
from next_core.history.history import History
from next_core.history.matrix_tasks import InnerProducts
from next_core.interfaces import CheckpointSource, CoefficientUpdate, Prediction
from next_core.interfaces.prediction import coefficients
from next_core.mathematics import low_rank
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank
from next_core.sources.source_views import RandomWalk, UpTo, with_origin
from next_core.types import Span

Shared = dict[Span, dict[str, Factors]]  # Decomposed deltas, which are the same at every cut that has seen them


@dataclass(frozen=True)
class Replay:
    """A run, predicted ``horizon`` steps ahead from each of ``cuts``, and likewise ``draws`` random walks of it.

    ``steps`` are all observed ones. ``start`` is the first if there is no backbone to count from, else None; the
    first increment is then empty. A replay is also the task that measures the motion of one matrix.
    """

    source: CheckpointSource
    steps: tuple[int, ...]
    cuts: tuple[int, ...]
    horizon: int
    draws: int
    seed: int
    start: int | None = None

    @property
    def jumps(self) -> bool:
        """Whether later jumps moved the checkpoints before them: the same delta then differs from cut to cut."""
        return self.source.as_of(self.cuts[0]) is not self.source

    @property
    def block(self) -> int:
        """How many neighbouring cuts predict overlapping motion."""
        gaps = [after - before for before, after in itertools.pairwise(self.cuts)]
        return max(1, -(-self.horizon // int(statistics.median(gaps)))) if gaps else 1

    def run(self, draw: int) -> CheckpointSource:
        """Return the run itself for draw 0, else one of its random walks."""
        return RandomWalk(self.source, self.seed, draw) if draw else self.source

    def __call__(self, name: str) -> dict[tuple[int, int], Tensor]:
        """Return the motion of one matrix by draw (0 is the run itself) and cut, fp64, (n + 1, n + 1).

        It is the Gram matrix of the n increments up to the cut and of the motion that followed, which comes last.
        Raises ``CheckpointError`` for values that are not finite.
        """
        found = dict[tuple[int, int], Tensor]()
        lora = self.source.factors(name, self.cuts[0]) is not None
        for draw in range(1 + self.draws):
            run = self.run(draw)
            if lora and self.jumps:
                found |= {(draw, cut): self._as_of(cut, run, name) for cut in self.cuts}
                continue
            if lora or not isinstance(run, RandomWalk):
                gram = plain = InnerProducts(run, tuple(self._increments(self.steps[-1])))(name)
            else:  # the increments of a dense matrix are those of the run, but for their signs
                signs = run.signs(name)
                eps = torch.tensor([signs.get(step, 1.0) for step in self.steps], dtype=torch.float64)
                gram = plain * eps * eps[:, None]
            for cut in self.cuts:
                # Rows: each increment up to the cut alone, then the sum of those that followed up to the horizon.
                ahead = torch.tensor([[float(cut < step <= cut + self.horizon) for step in self.steps]]).double()
                rows = torch.cat([torch.eye(len(self.steps)).double()[: len(self._increments(cut))], ahead])
                found[draw, cut] = rows @ gram @ rows.T
        if not all(bool(gram.isfinite().all()) for gram in found.values()):
            message = f"'{name}' holds NaN, Inf or numbers whose squares are; is a checkpoint damaged?"
            raise CheckpointError(message, kind="checkpoint-not-finite")
        return found

    def _increments(self, until: int) -> list[Span]:
        """Return the spans between neighbouring checkpoints up to a step; the first counts from where RL began."""
        seen = [step for step in self.steps if step <= until]
        return list(zip(seen, (self.start, *seen), strict=False))

    def _as_of(self, cut: int, run: CheckpointSource, name: str) -> Tensor:
        """Measure a LoRA run with jumps: they move A and B, and so change every later B_t A_t - B_s A_s."""
        end = cut + self.horizon
        past, later, spans = run.as_of(cut), run.as_of(end), self._increments(cut)
        # The motion that followed has two points of its own, -1 and -2: later jumps moved even its start.
        points = {step: past.factors(name, step) for step, _ in spans}
        points |= {-1: later.factors(name, cut), -2: later.factors(name, end)}
        known = {step: at for step, at in points.items() if at is not None}
        return LoraTrajectory(known, past.start(name)).gram([*spans, (-2, -1)])


def make_replay(
    source: CheckpointSource, steps: Sequence[int], horizon: int | None, cuts: int | None, draws: int, seed: int
) -> Replay:
    """Fill in what is None. Raises ``ConfigError`` for wrong settings, ``CheckpointError`` for a short run."""
    if horizon is not None and horizon < 1:
        raise invalid_value(f"horizon must be at least 1 RL step (got {horizon})")
    if cuts is not None and cuts < 1:
        raise invalid_value(f"cuts must be at least 1 (got {cuts})")
    if draws < 0 or draws == 1:
        raise invalid_value(f"draws must be 0 (no null) or at least 2, for an interval (got {draws})")
    if len([step for step in steps if step > 0]) < 2:
        message = f"a backtest needs at least 2 checkpoints after step 0 (got {len(steps)})"
        raise CheckpointError(message, kind="checkpoint-too-few")
    chosen = default_horizon(steps) if horizon is None else horizon
    start = None if with_origin(source) is source else steps[0]
    every = tuple(cut for cut in cuts_of(steps, chosen) if cut != start)  # before which nothing is known
    if not every:
        there = ", ".join(map(str, sorted({b - a for a, b in itertools.combinations(steps, 2) if a > 0})))
        raise invalid_value(f"no two checkpoints are {chosen} steps apart; choose a horizon of {there}")
    if cuts is not None and cuts < len(every):
        every = every[:: -(len(every) // cuts)][:cuts][::-1]  # evenly spaced, back from the last
    return Replay(source, tuple(steps), every, chosen, draws, seed, start)


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


class CutHistory(History):
    """A run, or a walk, as it stood at a cut, and what followed, which predictors are never shown.

    ``motion`` has per matrix what ``Replay`` measured; ``shared`` is filled with what the history decomposes.
    """

    def __init__(
        self, whole: History, replay: Replay, draw: int, cut: int, motion: Mapping[str, Tensor], shared: Shared
    ) -> None:
        self._motion, self._shared, self._start = motion, shared, replay.start
        run, end = replay.run(draw), cut + replay.horizon
        later = run.as_of(end)
        self._motion_ahead = functools.lru_cache(1)(lambda name: later.delta(name, end, cut))
        options: dict[str, Any] = {"spectrum": whole.spectrum, "executor": whole.executor, "cache": whole.cache}
        super().__init__(UpTo(run, cut), whole.rank, whole.compressor, **options)

    def _unchanged(self, name: str, step: int, before: int | None) -> bool:
        return not bool(self._motion[name][-2, -2] > 0)

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        known = (None, *self.steps) if self._start is None else self.steps
        if any(step not in known or since not in known for step, since in spans):
            return super().inner_products(spans)
        sums = torch.stack([self._path(step) - self._path(since) for step, since in spans])
        return {name: sums @ self._motion[name] @ sums.T for name in self.names}

    def _decompose(self, spans: Sequence[Span]) -> dict[str, Factors]:
        todo = [span for span in spans if not self._shared.get(span, {}).keys() >= set(self.names)]
        for name, factors in (super()._decompose(todo) if todo else {}).items():
            for row, span in enumerate(todo):
                self._shared.setdefault(span, {})[name] = factors.rows([row])
        return {name: low_rank.concatenate_batches([self._shared[span][name] for span in spans]) for name in self.names}

    def _path(self, step: int | None) -> Tensor:
        """Return W_step - W_0 as coefficients of the rows of ``motion``, (n + 1,); None is where RL began."""
        along = torch.zeros(len(self.steps) + 1, dtype=torch.float64)
        if step is not None:
            along[: self.steps.index(step) + 1] = 1
        return along

    def compare(self, prediction: Prediction, name: str) -> tuple[float, float]:
        """Return <P, P> and <P, D>: P the predicted motion of one matrix at alpha 1, D the motion that followed.

        Raises ``GuardError`` for a prediction that is not finite or whose squares are not, ``PluginError`` for a wrong
        shape or steps that were not observed.
        """
        update = prediction.updates[name]
        if isinstance(update, CoefficientUpdate) and (update.space == "merged" or self.ranks[name] is None):
            weights = coefficients(prediction, name, 1.0)
            weights.pop(0, None)  # where RL began, which W_t - W_0 counts from
            along = sum((weight * self._path(step) for step, weight in weights.items()), self._path(None))
            if self._start is not None and abs(along[0]) > 1e-9 * sum(map(abs, weights.values())):
                self.source.delta(name, self._start)  # raises: the prediction counts from the backbone
            PP, PD = float(along @ self._motion[name] @ along), float(along @ self._motion[name][-1])
        else:
            predicted, ahead = prediction.delta(name), self._motion_ahead(name)
            PP, PD = _inner(predicted, predicted), _inner(predicted, ahead)
        if not math.isfinite(PP * PP):  # figures multiply it by itself
            message = f"the predicted motion of '{name}' is too large to be compared; use a smaller one"
            raise GuardError(message, kind="numbers-not-finite")
        return PP, PD


def _inner(a: LowRank | Tensor, b: LowRank | Tensor) -> float:
    """Return the Frobenius inner product; b is dense where a is."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(low_rank.inner(a, b))
    assert isinstance(b, Tensor)
    if isinstance(a, LowRank):
        return float(((a.left.double().mT @ b.double()) * a.right.double()).sum())
    return float((a.double() * b.double()).sum())

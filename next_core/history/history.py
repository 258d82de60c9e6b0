"""A run's deltas over time (global, local, target): compressed on demand, cached, with aligned signs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.compressors.lanczos import LanczosCompressor
from next_core.errors import CheckpointError, contradiction, invalid_value, no_history
from next_core.history.delta_cache import DeltaCache, cache_key, compression_settings
from next_core.history.executor import Executor, Task
from next_core.history.matrix_tasks import Compress, InnerProducts
from next_core.interfaces import CheckpointSource, Compressor
from next_core.interfaces.weight_delta import BLOCK
from next_core.mathematics.agreement import factor_motion_gram
from next_core.mathematics.low_rank import Factors, align_signs, concatenate_batches
from next_core.mathematics.row_blocks import row_blocks
from next_core.types import LoraFactors, Progress, Span

DeltaKind = Literal["global", "local", "target"]
Result = TypeVar("Result")


class History:
    """The trajectory of every matrix that moves, as predictors read it.

    ``names`` are the matrices that moved over the last interval. ``frozen`` maps the others to the reason why they are
    never predicted. With ``spectrum``, components include the sum of all singular values (``Factors.nuclear``), which
    needs a full decomposition. The default ``compressor`` is ``exact`` for LoRA runs and with ``spectrum``, otherwise
    ``lanczos``. Raises ``CheckpointError`` if the run has no checkpoint, ``ConfigError`` for a rank below 1.
    """

    def __init__(
        self,
        source: CheckpointSource,
        rank: int = 1,
        compressor: Compressor | None = None,
        progress: Progress | None = None,
        *,
        spectrum: bool = False,
        executor: Executor | None = None,
        cache: DeltaCache | None = None,
    ) -> None:
        if rank < 1:
            raise invalid_value(f"rank must be at least 1 (got {rank})")
        if not source.steps:
            raise no_history("the run has no checkpoint yet; observe at least one before fitting")
        self.source = source
        self.rank = rank
        self.spectrum = spectrum
        self.steps = source.steps
        self.shapes = {parameter.name: parameter.shape for parameter in source.parameters}
        self.ranks = {parameter.name: parameter.rank for parameter in source.parameters}
        self.frozen = self._find_frozen()
        self.names = tuple(sorted(name for name in self.shapes if name not in self.frozen))
        dense = any(rank is None for rank in self.ranks.values())
        # Exact takes minutes for one large dense matrix, but only it has the whole spectrum.
        self.compressor = compressor or (LanczosCompressor() if dense and not spectrum else ExactCompressor())
        self._progress = progress
        self.executor = executor if executor is not None else Executor()
        self.cache = cache
        self.jump_log: Sequence[Mapping[str, Any]] = ()
        """The journal's records of the jumps tried so far; empty for a recorded run."""
        self._grams: dict[tuple[Span, ...], dict[str, Tensor]] = {}
        self._components: dict[tuple[DeltaKind, int | None], dict[str, Factors]] = {}
        self._flips: dict[tuple[DeltaKind, int | None], dict[str, Tensor]] = {}  # of the aligned components

    @property
    def newest(self) -> int:
        """The newest observed step."""
        return self.steps[-1]

    @property
    def cache_trouble(self) -> str | None:
        """Why the cache could not be read or written; None if it could."""
        return None if self.cache is None else self.cache.trouble

    def span(self, step: int, since: int) -> Span:
        """Return the span between two steps; a step 0 without a checkpoint is where RL began."""
        return step, None if since == 0 and 0 not in self.steps else since

    def matrix(self, name: str) -> MatrixHistory:
        """Return the view of one matrix."""
        return MatrixHistory(self, name)

    def metrics(self, key: str) -> list[float | None]:
        """Return one value per checkpoint: the last one logged since the previous checkpoint, or None."""
        before = (None, *self.steps)
        return [self.source.metrics(step, since).get(key) for step, since in zip(self.steps, before, strict=False)]

    def pairs(self, horizon: int) -> list[tuple[int, int]]:
        """Return index pairs (i, j) with steps[j] - steps[i] == horizon: the targets observed so far."""
        where = {step: index for index, step in enumerate(self.steps)}
        return [(i, where[step + horizon]) for i, step in enumerate(self.steps) if step + horizon in where]

    def grams(self, steps: Sequence[int] | None = None) -> Mapping[str, Tensor]:
        """Return per matrix the inner products <G_s, G_t> of global deltas, fp64, (len(steps), len(steps)).

        Everything linear (secants, least squares, the SVD over time) follows from them. LoRA runs form no m x n matrix:
        <G_s, G_t> = tr((B_s^T B_t)(A_t A_s^T)).
        """
        return self.inner_products([(step, None) for step in (self.steps if steps is None else steps)])

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        """Return per matrix the inner products of the deltas of several spans, fp64, (len(spans), len(spans)).

        Deltas between checkpoints are computed directly, not from global deltas, so short ones lose no digits to
        cancellation.
        """
        chosen = tuple(spans)
        if chosen not in self._grams:
            # Dense ones are not cached: fingerprinting the files costs as much as computing them.
            dense = any(self.ranks[name] is None for name in self.names)
            key = None if dense else self._key(chosen, "inner products")
            found = None if self.cache is None else self.cache.load_tensors(key, self.names)
            if found is None:
                found = self._map("inner products", InnerProducts(self.source, chosen))
                if self.cache is not None:
                    self.cache.save_tensors(key, found)
            self._grams[chosen] = found
        return self._grams[chosen]

    def _map(self, what: str, task: Task[Result]) -> dict[str, Result]:
        """Run a task for every matrix that moves."""
        made: dict[str, Result] = {}
        for name, value in zip(self.names, self.executor.map(task, self.names), strict=True):
            made[name] = value
            if self._progress is not None:
                self._progress(what, len(made), len(self.names))
        return made

    def components(self, kind: DeltaKind, horizon: int | None = None, align: bool = True) -> Mapping[str, Factors]:
        """Return per matrix its rank-k singular triplets over time: ``Factors`` with leading dimension T.

        ``global`` and ``local`` have one row per checkpoint; ``target`` needs ``horizon`` and has one row per pair of
        ``pairs(horizon)``, at the earlier step. With ``align``, signs are chosen from the newest checkpoint backwards,
        with the newest global delta as the reference of all three kinds, so that u of different kinds can be compared.
        """
        if (kind == "target") != (horizon is not None):
            raise contradiction("target deltas need a horizon; other kinds take none")
        key = kind, horizon
        if key not in self._components:
            self.compress(kind, horizon=horizon)
        if align and key not in self._flips:
            self._align(kind, horizon)
        if not align and key in self._flips:
            flips = self._flips[key]
            return {name: factors.flip(flips[name]) for name, factors in self._components[key].items()}
        return self._components[key]

    def _align(self, kind: DeltaKind, horizon: int | None) -> None:
        """Align components in place and keep which signs were flipped: cheaper than a second copy of them all."""
        references = {} if kind == "global" else self.components("global")
        found: dict[str, Factors] = {}
        flips: dict[str, Tensor] = {}
        for name, raw in self._components[kind, horizon].items():
            found[name] = align_signs(raw, references[name].rows(-1) if references else None)
            flips[name] = torch.where((found[name].U * raw.U).sum(-2) < 0, -1.0, 1.0)
        self._components[kind, horizon], self._flips[kind, horizon] = found, flips

    def _spans(self, kind: DeltaKind, horizon: int | None) -> list[Span]:
        """Return the (step, since) of each delta of one kind."""
        if kind == "global":
            return [(step, None) for step in self.steps]
        if kind == "local":
            return [(step, before) for before, step in itertools.pairwise((None, *self.steps)) if step is not None]
        assert horizon is not None
        return [(self.steps[j], self.steps[i]) for i, j in self.pairs(horizon)]

    def compress(self, *kinds: DeltaKind, horizon: int | None = None) -> None:
        """Decompose the deltas of several kinds in one pass, which reads and multiplies shared factors once.

        ``components`` calls this for one kind on demand; a predictor that reads several kinds calls it first.
        """
        wanted = {kind: (kind, horizon if kind == "target" else None) for kind in kinds}
        spans = {key: self._spans(kind, key[1]) for kind, key in wanted.items() if key not in self._components}
        union = list(dict.fromkeys(span for some in spans.values() for span in some))
        made = self._decompose(union) if union else {}
        where = {span: row for row, span in enumerate(union)}
        for key, some in spans.items():
            rows = [where[span] for span in some]
            self._components[key] = {name: factors.rows(rows) for name, factors in made.items()} if rows else {}

    def _decompose(self, spans: Sequence[Span]) -> dict[str, Factors]:
        """Return the triplets of every matrix, one row per span, from the cache where it has them."""
        version = "" if self.cache is None else self.cache.compressor_version
        settings = compression_settings(self.compressor, self.rank, self.spectrum, version)
        keys = {span: self._key([span], *settings) for span in spans}
        known = {span: found for span in spans if (found := self._cached(keys[span])) is not None}
        todo = tuple(span for span in spans if span not in known)
        made: dict[str, Factors] = {}
        if todo:
            made = self._map("compress", Compress(self.source, self.compressor, todo, self.rank, self.spectrum))
        if self.cache is not None:
            for row, span in enumerate(todo):
                self.cache.save(keys[span], {name: found.rows([row]) for name, found in made.items()})
        if not known:
            return made
        where = {span: row for row, span in enumerate(todo)}
        return {
            name: concatenate_batches(
                [known[span][name] if span in known else made[name].rows([where[span]]) for span in spans]
            )
            for name in self.names
        }

    def _cached(self, key: str | None) -> dict[str, Factors] | None:
        return None if self.cache is None else self.cache.load(key, self.names)

    def _key(self, spans: Sequence[Span], *more: object) -> str | None:
        return None if self.cache is None else cache_key(self.source, spans, *more)

    def _find_frozen(self) -> dict[str, str]:
        newest = self.steps[-1]
        before = self.steps[-2] if len(self.steps) > 1 else None
        since = "the backbone" if before is None else f"step {before}"
        return {name: f"did not move since {since}" for name in self.shapes if self._unchanged(name, newest, before)}

    def _unchanged(self, name: str, step: int, before: int | None) -> bool:
        """Whether a matrix has the same stored values at two steps; ``before`` None is where RL began."""
        now = self.source.factors(name, step)
        if now is None:
            blocks = row_blocks(self.shapes[name], BLOCK)  # a matrix that moves shows it in the first block
            return not any(bool(self.source.delta_rows(name, rows, step, before).any()) for rows in blocks)
        then = self.source.start(name) if before is None else self.source.factors(name, before)
        if before is None and then is None:
            return not bool(now.B.any() and now.A.any())
        return then is not None and torch.equal(now.A, then.A) and torch.equal(now.B, then.B)


@dataclass(frozen=True)
class MatrixHistory:
    """One matrix of a history, as a per-matrix predictor receives it."""

    history: History
    name: str

    @property
    def steps(self) -> tuple[int, ...]:
        return self.history.steps

    @property
    def shape(self) -> tuple[int, int]:
        return self.history.shapes[self.name]

    def gram(self, steps: Sequence[int] | None = None) -> Tensor:
        """Return the inner products <G_s, G_t> of global deltas, fp64, (T, T)."""
        return self.history.grams(steps)[self.name]

    def components(self, kind: DeltaKind, horizon: int | None = None, align: bool = True) -> Factors:
        """Return rank-k singular triplets over time, leading dimension T; see ``History.components``."""
        return self.history.components(kind, horizon, align)[self.name]

    def metrics(self, key: str) -> list[float | None]:
        """Return one value per checkpoint, None where none was logged."""
        return self.history.metrics(key)


def motion_grams(history: History, points: Sequence[int]) -> Mapping[str, Tensor]:
    """Return per moving matrix the inner products of the motions between N + 1 successive points, fp64, (N, N).

    The motions are those of A and B where the run has factors: a jump in factor space moves these too, so motion and
    jump are measured alike. Otherwise they are deltas. A point 0 that is not a checkpoint is where RL began. The
    factors of each point are read once.
    """
    spans = [history.span(step, since) for since, step in itertools.pairwise(points)]
    found = {}
    for name in history.names:
        factors = _factors(history, name, points)
        found[name] = history.inner_products(spans)[name] if factors is None else factor_motion_gram(factors)
    return found


def _factors(history: History, name: str, points: Sequence[int]) -> list[LoraFactors] | None:
    try:
        found = [history.source.factors(name, point) for point in points]
    except CheckpointError:  # step 0 was not kept
        return None
    return None if None in found else [factors for factors in found if factors is not None]

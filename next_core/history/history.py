"""A run's deltas over time (global, local, target): compressed lazily, cached, signs aligned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.compressors.lanczos import LanczosCompressor
from next_core.errors import CheckpointError, ConfigError
from next_core.history.delta_cache import DeltaCache, how, spans_key
from next_core.history.executor import Executor, Task
from next_core.history.matrix_tasks import BLOCK_BYTES, Compress, InnerProducts
from next_core.interfaces import CheckpointSource, Compressor
from next_core.mathematics import low_rank as lowrank
from next_core.mathematics.low_rank import Factors
from next_core.mathematics.row_blocks import row_blocks
from next_core.types import Progress, Span

DeltaKind = Literal["global", "local", "target"]
Result = TypeVar("Result")


class History:
    """What predictors read: the trajectory of every matrix that moves.

    ``names`` are the matrices that moved over the last interval; ``frozen`` names the others, with the reason, and
    they are never predicted. With ``spectrum``, components carry the sum of all singular values too
    (``Factors.nuclear``), which costs a full decomposition. The default ``compressor`` is ``exact`` for LoRA runs and
    where the spectrum is asked for, else ``lanczos``. Raises ``CheckpointError`` when there is no checkpoint.
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
            raise ConfigError(f"rank must be at least 1 (got {rank})")
        if not source.steps:
            raise CheckpointError("the run has no checkpoint yet; observe at least one before fitting")
        self.source = source
        self.rank = rank
        self.spectrum = spectrum
        self.steps = source.steps
        self.shapes = {parameter.name: parameter.shape for parameter in source.parameters}
        self.ranks = {parameter.name: parameter.rank for parameter in source.parameters}
        self.frozen = self._find_frozen()
        self.names = tuple(sorted(name for name in self.shapes if name not in self.frozen))
        dense = any(rank is None for rank in self.ranks.values())
        # The exact one takes minutes for one large dense matrix; only it knows the whole spectrum.
        self.compressor = compressor or (LanczosCompressor() if dense and not spectrum else ExactCompressor())
        self._progress = progress
        self.executor = executor if executor is not None else Executor()
        self.cache = cache
        self.jump_log: Sequence[Mapping[str, Any]] = ()
        """The jumps tried so far, as the journal of the run has them; none for a recorded run."""
        self._grams: dict[tuple[Span, ...], dict[str, Tensor]] = {}
        self._components: dict[tuple[DeltaKind, int | None], dict[str, Factors]] = {}
        self._turns: dict[tuple[DeltaKind, int | None], dict[str, Tensor]] = {}  # of the components that are aligned

    @property
    def newest(self) -> int:
        """The newest observed step."""
        return self.steps[-1]

    @property
    def cache_trouble(self) -> str | None:
        """Why something could not be read from the cache or kept in it; None when all went well."""
        return None if self.cache is None else self.cache.trouble

    def matrix(self, name: str) -> MatrixHistory:
        """The view of one matrix."""
        return MatrixHistory(self, name)

    def metrics(self, key: str) -> list[float | None]:
        """One metric per checkpoint: the last value logged since the checkpoint before, None where there is none."""
        before = (None, *self.steps)
        return [self.source.metrics(step, since).get(key) for step, since in zip(self.steps, before, strict=False)]

    def pairs(self, horizon: int) -> list[tuple[int, int]]:
        """Index pairs (i, j) with steps[j] - steps[i] == horizon: the targets that were already observed."""
        where = {step: index for index, step in enumerate(self.steps)}
        return [(i, where[step + horizon]) for i, step in enumerate(self.steps) if step + horizon in where]

    def grams(self, steps: Sequence[int] | None = None) -> Mapping[str, Tensor]:
        """Per matrix the inner products <G_s, G_t> of global deltas, fp64, (len(steps), len(steps)).

        Everything linear (secants, least squares, the time SVD) can be computed from them. From LoRA factors no
        m x n matrix is formed: <G_s, G_t> = tr((B_s^T B_t)(A_t A_s^T)).
        """
        return self.inner_products([(step, None) for step in (self.steps if steps is None else steps)])

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        """Per matrix the inner products of the deltas of several (step, since), fp64, (len(spans), len(spans)).

        Deltas between checkpoints are taken directly, so that short ones lose nothing to cancellation.
        """
        chosen = tuple(spans)
        if chosen not in self._grams:
            # From whole matrices they cost no more than telling whether the files are the same.
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
        """A task of every matrix that moves."""
        made: dict[str, Result] = {}
        for name, value in zip(self.names, self.executor.map(task, self.names), strict=True):
            made[name] = value
            if self._progress is not None:
                self._progress(what, len(made), len(self.names))
        return made

    def components(self, kind: DeltaKind, horizon: int | None = None, align: bool = True) -> Mapping[str, Factors]:
        """Rank-k singular triplets over time: per matrix ``Factors`` with leading dimension T.

        ``global`` and ``local`` have one row per checkpoint; ``target`` needs ``horizon`` and has one row per pair of
        ``pairs(horizon)``, at the earlier step. With ``align``, signs are chosen walking from the newest checkpoint
        backwards, the newest global delta being the reference for all three.
        """
        if (kind == "target") != (horizon is not None):
            raise ConfigError("a horizon belongs to target deltas, and only to them")
        key = kind, horizon
        if key not in self._components:
            self.compress(kind, horizon=horizon)
        if align and key not in self._turns:
            self._align(kind, horizon)
        if not align and key in self._turns:
            turns = self._turns[key]
            return {name: factors.flip(turns[name]) for name, factors in self._components[key].items()}
        return self._components[key]

    def _align(self, kind: DeltaKind, horizon: int | None) -> None:
        """Turn components to be continuous; which were turned is kept, and not a second copy of them all."""
        references = {} if kind == "global" else self.components("global")
        found: dict[str, Factors] = {}
        turns: dict[str, Tensor] = {}
        for name, raw in self._components[kind, horizon].items():
            found[name] = lowrank.align_signs(raw, _newest(references[name]) if references else None)
            turns[name] = torch.where((found[name].U * raw.U).sum(-2) < 0, -1.0, 1.0)
        self._components[kind, horizon], self._turns[kind, horizon] = found, turns

    def _spans(self, kind: DeltaKind, horizon: int | None) -> list[Span]:
        """The (step, since) of each delta of one kind."""
        if kind == "global":
            return [(step, None) for step in self.steps]
        if kind == "local":
            return [(step, before) for before, step in itertools.pairwise((None, *self.steps)) if step is not None]
        assert horizon is not None
        return [(self.steps[j], self.steps[i]) for i, j in self.pairs(horizon)]

    def compress(self, *kinds: DeltaKind, horizon: int | None = None) -> None:
        """Decompose the deltas of several kinds in one pass, which shares what they have in common.

        ``components`` does so for one kind when it is asked for; a predictor that reads more calls this first.
        """
        wanted = {kind: (kind, horizon if kind == "target" else None) for kind in kinds}
        spans = {key: self._spans(kind, key[1]) for kind, key in wanted.items() if key not in self._components}
        union = list(dict.fromkeys(span for some in spans.values() for span in some))
        made = self._decompose(union) if union else {}
        where = {span: row for row, span in enumerate(union)}
        for key, some in spans.items():
            rows = [where[span] for span in some]
            self._components[key] = {name: _rows(factors, rows) for name, factors in made.items()} if rows else {}

    def _decompose(self, spans: Sequence[Span]) -> dict[str, Factors]:
        """The triplets of every matrix, one row a span; what the cache has is not computed again."""
        version = "" if self.cache is None else self.cache.compressor_version
        keys = {span: self._key([span], *how(self.compressor, self.rank, self.spectrum, version)) for span in spans}
        known = {span: found for span in spans if (found := self._cached(keys[span])) is not None}
        todo = tuple(span for span in spans if span not in known)
        made: dict[str, Factors] = {}
        if todo:
            made = self._map("compress", Compress(self.source, self.compressor, todo, self.rank, self.spectrum))
        if self.cache is not None:
            for row, span in enumerate(todo):
                self.cache.save(keys[span], {name: _rows(found, [row]) for name, found in made.items()})
        if not known:
            return made
        where = {span: row for row, span in enumerate(todo)}
        return {
            name: lowrank.concatenate_batches(
                [known[span][name] if span in known else _rows(made[name], [where[span]]) for span in spans]
            )
            for name in self.names
        }

    def _cached(self, key: str | None) -> dict[str, Factors] | None:
        return None if self.cache is None else self.cache.load(key, self.names)

    def _key(self, spans: Sequence[Span], *more: object) -> str | None:
        return None if self.cache is None else spans_key(self.source, spans, *more)

    def _find_frozen(self) -> dict[str, str]:
        newest = self.steps[-1]
        before = self.steps[-2] if len(self.steps) > 1 else None
        since = "the backbone" if before is None else f"step {before}"
        return {name: f"did not move since {since}" for name in self.shapes if self._still(name, newest, before)}

    def _still(self, name: str, step: int, before: int | None) -> bool:
        now = self.source.factors(name, step)
        if now is None:
            blocks = row_blocks(self.shapes[name], BLOCK_BYTES // 8)  # what moved shows it in its first rows
            return not any(bool(self.source.delta_rows(name, rows, step, before).any()) for rows in blocks)
        then = self.source.start(name) if before is None else self.source.factors(name, before)
        if before is None and then is None:
            return not bool(now.B.any() and now.A.any())
        return then is not None and torch.equal(now.A, then.A) and torch.equal(now.B, then.B)


@dataclass(frozen=True)
class MatrixHistory:
    """One matrix of a history: what a per-matrix predictor is given."""

    history: History
    name: str

    @property
    def steps(self) -> tuple[int, ...]:
        return self.history.steps

    @property
    def shape(self) -> tuple[int, int]:
        return self.history.shapes[self.name]

    @property
    def factored(self) -> bool:
        """Whether the run is LoRA."""
        return self.history.ranks[self.name] is not None

    def gram(self, steps: Sequence[int] | None = None) -> Tensor:
        """<G_s, G_t>, fp64, (T, T)."""
        return self.history.grams(steps)[self.name]

    def components(self, kind: DeltaKind, horizon: int | None = None, align: bool = True) -> Factors:
        """Rank-k singular triplets over time, leading dimension T."""
        return self.history.components(kind, horizon, align)[self.name]

    def metrics(self, key: str) -> list[float | None]:
        """One metric per checkpoint, None where it was not logged."""
        return self.history.metrics(key)


def _rows(factors: Factors, rows: list[int] | int) -> Factors:
    nuclear = None if factors.nuclear is None else factors.nuclear[rows]
    return Factors(factors.U[rows], factors.S[rows], factors.V[rows], factors.energy[rows], nuclear)


def _newest(factors: Factors) -> Factors:
    return _rows(factors, -1)

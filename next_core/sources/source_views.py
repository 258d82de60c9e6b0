"""Other views of a run: as it stood at a step, as a random walk, and counted from its first checkpoint."""

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from next_core.errors import CheckpointError, not_found
from next_core.interfaces import CheckpointSource
from next_core.interfaces.checkpoint_source import StoredModel
from next_core.mathematics.low_rank import LowRank
from next_core.sources.memory import lora_delta
from next_core.types import LoraFactors, Parameter


class SourceView(CheckpointSource):
    """A source that shows another one, ``inner``, and changes some of it."""

    def __init__(self, inner: CheckpointSource) -> None:
        super().__init__()
        self.inner = inner

    @property
    def steps(self) -> tuple[int, ...]:
        return self.inner.steps

    @property
    def begins(self) -> int:
        return self.inner.begins

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.inner.parameters

    @property
    def skipped(self) -> Mapping[str, str]:
        return self.inner.skipped

    def precision(self, name: str) -> torch.dtype:
        return self.inner.precision(name)

    def factors(self, name: str, step: int) -> LoraFactors | None:
        return self.inner.factors(name, step)

    def start(self, name: str) -> LoraFactors | None:
        return self.inner.start(name)

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        return self.inner.logged_metrics()


class UpTo(SourceView):
    """A run as it stood when step ``last`` was reached: no later checkpoint, metric or jump is in it.

    Raises ``CheckpointError`` when a later step is asked for.
    """

    name = "up-to"

    def __init__(self, run: CheckpointSource, last: int) -> None:
        super().__init__(run.as_of(last))
        self.last = last

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.inner, self.last)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step in self.inner.steps if step <= self.last)

    def fingerprint(self, step: int | None) -> str | None:
        return self.inner.fingerprint(self._seen(step))

    def factors(self, name: str, step: int) -> LoraFactors | None:
        self._seen(step)
        return self.inner.factors(name, step)

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        self._seen(step)
        return self.inner.delta(name, step, self._seen(since))

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        self._seen(step)
        return self.inner.delta_rows(name, rows, step, self._seen(since))

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        return {step: logged for step, logged in super().logged_metrics().items() if step <= self.last}

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        self._seen(step)
        return super().metrics(step, since)

    def _seen(self, step: int | None) -> int | None:
        if step is not None and step > self.last:
            raise not_found(
                f"step {step} is later than step {self.last}, where this view of the run ends; it shows {self.steps}"
            )
        return step


class RandomWalk(SourceView):
    """A run whose every increment between neighbouring checkpoints is multiplied by a random sign.

    The steps keep their lengths, but nothing of the walk can be predicted. Dense: W_t = W_0 + sum_i eps_i (W_i -
    W_{i-1}). LoRA: the factors walk, A_t = A_0 + sum_i eps_i (A_i - A_{i-1}), and B_t with the same eps_i.
    """

    name = "random-walk"

    def __init__(self, run: CheckpointSource, seed: int, draw: int) -> None:
        super().__init__(run)
        self.seed, self.draw = seed, draw
        self._lora = {parameter.name for parameter in run.parameters if parameter.kind == "lora"}
        self._walked: tuple[str, dict[int, LoraFactors]] = "", {}  # of the matrix that was read last

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.inner, self.seed, self.draw)

    def as_of(self, step: int) -> CheckpointSource:
        run = self.inner.as_of(step)
        return self if run is self.inner else RandomWalk(run, self.seed, self.draw)

    def signs(self, name: str) -> dict[int, float]:
        """Return the sign of each increment of one matrix, by the observed step that it ends at.

        They depend on the seed, the draw and the matrix's name alone.
        """
        ends = [step for step in self.steps if step > 0]
        random = np.random.default_rng([self.seed, self.draw, zlib.crc32(name.encode())])
        return dict(zip(ends, (random.integers(0, 2, len(ends)) * 2.0 - 1.0).tolist(), strict=True))

    def factors(self, name: str, step: int) -> LoraFactors | None:
        if name not in self._lora:
            return None
        if self._walked[0] != name:
            self._walked = name, self._walk(name)
        walked = self._walked[1]
        return walked[step] if step in walked else self.inner.factors(name, step)  # which raises the right error

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        now = self.factors(name, step)
        if now is None:
            return self._signed_sum(name, functools.partial(self.inner.delta, name), step, since)  # type: ignore[arg-type]
        if since is None:
            return lora_delta(now, self.start(name) if step > 0 else None)
        return lora_delta(now, self.factors(name, since))

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        if name in self._lora:
            return super().delta_rows(name, rows, step, since)
        return self._signed_sum(name, functools.partial(self.inner.delta_rows, name, rows), step, since)

    def _walk(self, name: str) -> dict[int, LoraFactors]:
        """Return the factors at every observed step, and at step 0 where it was kept."""
        signs = self.signs(name)
        path = [self.inner.factors(name, step) for step in signs]
        first, kept = next(iter(signs)), True
        try:
            start = self.inner.factors(name, 0)
        except CheckpointError:
            kept, start = False, self.inner.as_of(first).factors(name, first)
        points = [at for at in (start, *path) if at is not None]
        A, B = ([at.A for at in points], [at.B for at in points])
        if not kept:  # A began where it was first seen, and B at zero, or where later jumps put it
            A[0], B[0] = A[1], B[1] - B[0]
        walked = map(LoraFactors, *(_signed_path(x, [*signs.values()]) for x in (A, B)), [at.scaling for at in points])
        return {step: at for step, at in zip((0, *signs), walked, strict=True) if step or kept}

    def _signed_sum(self, name: str, read: Callable[[int, int | None], Tensor], step: int, since: int | None) -> Tensor:
        """Return sum_i eps_i (W_i - W_{i-1}) over the increments from ``since`` to ``step`` of a dense matrix."""
        if since is not None and since > step:
            return -self._signed_sum(name, read, since, step)
        signs = {end: sign for end, sign in self.signs(name).items() if (since or 0) < end <= step}
        if not signs:
            return read(step, step if since is None else since)
        starts = (since, *signs)
        parts = (sign * read(end, start) for (end, sign), start in zip(signs.items(), starts, strict=False))
        return functools.reduce(torch.add, parts)


class FromFirstCheckpoint(SourceView):
    """A run whose start cannot be read (no backbone, or deleted): deltas count from its first checkpoint instead.

    Raises ``CheckpointError`` when there is only one checkpoint.
    """

    name = "from-first-checkpoint"

    def __init__(self, inner: CheckpointSource) -> None:
        super().__init__(inner)
        if len(inner.steps) < 2:
            raise CheckpointError(
                "one checkpoint and no start of the run to compare it with; pass --backbone, or a folder with more "
                "checkpoints",
                kind="checkpoint-too-few",
            )

    @property
    def origin(self) -> int:
        return self.inner.steps[0]

    @property
    def steps(self) -> tuple[int, ...]:
        return self.inner.steps[1:]

    @property
    def notes(self) -> Sequence[str]:
        why = "" if self.begins else "no backbone: "
        return (*self.inner.notes, f"{why}deltas count from the first checkpoint, step {self.origin}")

    @property
    def stores_full_weights(self) -> bool:
        return self.inner.stores_full_weights

    def model(self, step: int | None) -> StoredModel:
        return self.inner.model(self.origin if step is None else step)

    def fingerprint(self, step: int | None) -> str | None:
        return self.inner.fingerprint(self.origin if step is None else step)

    def start(self, name: str) -> LoraFactors | None:
        return self.inner.factors(name, self.origin)

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        return self.inner.delta(name, step, self.origin if since is None else since)

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        return self.inner.delta_rows(name, rows, step, self.origin if since is None else since)


def with_origin(source: CheckpointSource) -> CheckpointSource:
    """Return the source, or ``FromFirstCheckpoint`` of it when its start was deleted or its backbone cannot be read.

    Raises ``CheckpointError`` when there is only one checkpoint and nothing to compare it with.
    """
    dense = [parameter for parameter in source.parameters if parameter.rank is None]
    if not source.steps or not (dense or source.begins):
        return source
    smallest = min(dense or source.parameters, key=lambda parameter: parameter.shape[0] * parameter.shape[1]).name
    first = source.steps[0]
    source.delta_rows(smallest, slice(0, 1), first, first)  # a damaged checkpoint raises its own error here
    try:
        source.delta_rows(smallest, slice(0, 1), first, None)
    except CheckpointError:
        if source.begins and first == source.steps[-1]:
            raise
        return FromFirstCheckpoint(source)
    return source


def _signed_path(path: Sequence[Tensor], signs: Sequence[float]) -> list[Tensor]:
    """Return the walk that starts at the first value and takes the steps to the others, each with its sign, fp64."""
    walk = [path[0].double()]
    for (before, after), sign in zip(itertools.pairwise(path), signs, strict=True):
        walk.append(torch.add(walk[-1], after.double() - before.double(), alpha=sign))
    return walk

"""A recorded run as it stood at one of its steps, and the same run with each of its increments given a random sign."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_source import SHIFT_KEYS, PeftAdapterSource
from next_core.sources.jumps import SHIFT_FILE, Shift, Shifts, jump_folders
from next_core.sources.memory import lora_delta
from next_core.sources.tensor_cache import TensorCache
from next_core.types import LoraFactors, Parameter

Jumps = tuple[tuple[int, Path], ...]
"""Jumps that moved a run's LoRA factors: the step each was made after, and the file of what it moved them by."""


@dataclass(frozen=True)
class Signs:
    """One random walk with a run's own step lengths: each increment between neighbouring checkpoints is kept or turned.

    ``steps`` are the observed steps after 0; ``seed``, ``draw`` and a matrix's name decide its signs.
    """

    seed: int
    draw: int
    steps: tuple[int, ...]

    def of(self, name: str) -> Tensor:
        """+1 or -1 for the increment that ends at each step, (T,), fp64."""
        random = np.random.default_rng([self.seed, self.draw, zlib.crc32(name.encode())])
        return torch.from_numpy(random.integers(0, 2, len(self.steps)) * 2.0 - 1.0)


@dataclass(frozen=True)
class Course:
    """What LoRA factors at a step are sums of: those RL began with, the increments up to it, and the jumps before.

    ``steps`` are the observed steps after 0, ``jumps`` the steps after which a jump moved the factors.
    """

    steps: tuple[int, ...]
    jumps: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many parts there are."""
        return 1 + len(self.steps) + len(self.jumps)

    def at(self, step: int, until: int) -> Tensor:
        """Which parts make up the factors at a step, (size,), fp64, as one knows them when ``until`` is reached.

        A jump moves the checkpoints before it as well, so that deltas show what RL did; one that is still to come
        moves none.
        """
        parts = [1.0, *(float(each <= step) for each in self.steps), *(float(made < until) for made in self.jumps)]
        return torch.tensor(parts, dtype=torch.float64)

    def signs(self, signs: Signs | None, name: str) -> Tensor:
        """The sign of each part, (size,)."""
        found = torch.ones(self.size, dtype=torch.float64)
        if signs is not None:
            found[1 : 1 + len(self.steps)] = signs.of(name)
        return found


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one LoRA matrix: A (size, r, n), B (size, m, r), fp64; ``kept`` says whether step 0 can be read.

    ``starts`` tells, for the run without its jumps, whether deltas count from the adapter at step 0, because it adds
    something, or from the backbone.
    """

    A: Tensor
    B: Tensor
    scaling: float
    kept: bool
    starts: bool

    def factors(self, parts: Tensor) -> LoraFactors:
        """The sum of the parts, each times its coefficient (size,)."""
        return LoraFactors(torch.tensordot(parts, self.A, 1), torch.tensordot(parts, self.B, 1), self.scaling)


def factor_jumps(source: CheckpointSource) -> Jumps:
    """The jumps of a run folder that stand and moved LoRA factors; dense deltas have none left in them."""
    if not isinstance(source, PeftAdapterSource):
        return ()
    shifts = Shifts(source.config.path)
    if not shifts.in_run_folder:
        return ()
    found = [(record["step"], folder / SHIFT_FILE) for folder, record in jump_folders(shifts.root)]
    return tuple((step, path) for step, path in found if path.exists())


def read_parts(source: CheckpointSource, name: str, steps: Sequence[int], jumps: Jumps = ()) -> Parts | None:
    """The parts of one matrix, from its factors at the observed steps after 0; None where the run is not LoRA.

    Without a checkpoint of step 0, B began at zero and A where the first checkpoint has it.
    """
    found = [source.factors(name, step) for step in steps]
    path = [at for at in found if at is not None]
    if not path or len(path) < len(steps):
        return None
    try:
        origin = source.factors(name, 0)
    except CheckpointError:
        origin = None
    sides = []
    for key, side in zip(SHIFT_KEYS, "AB", strict=True):
        values = [getattr(at, side).detach() for at in path]
        shape, dtype = values[0].shape, values[0].dtype
        moved = [
            Shift(file, TensorCache()).added(torch.zeros(shape), key.format(name=name)).double() for _, file in jumps
        ]
        parts = torch.zeros(1 + len(path) + len(jumps), *shape, dtype=torch.float64)
        for index, (before, after) in enumerate(itertools.pairwise(values), 2):
            torch.sub(after.double(), before.double(), out=parts[index])
        first = _without(values[0].double(), moved, dtype)
        if origin is not None:
            start = getattr(origin, side).detach().double()
            parts[0], parts[1] = _without(start, moved, dtype), values[0].double() - start
        else:
            parts[1 if side == "B" else 0] = first
        for index, shift in enumerate(moved, 1 + len(path)):
            parts[index] = shift
        sides.append(parts)
    A, B = sides
    starts = bool(B[0].any()) if jumps else source.start(name) is not None
    return Parts(A, B, path[0].scaling, origin is not None, starts)


def _without(value: Tensor, moved: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor before jumps were added to it; what is then no more than rounding is zero, as B = 0 was."""
    if not moved:
        return value
    total, size = torch.stack(list(moved)).sum(0), torch.stack(list(moved)).abs().sum(0)
    rest = value - total
    return torch.where(rest.abs() <= 8 * torch.finfo(dtype).eps * size, 0.0, rest)


class Past(CheckpointSource):
    """A run as it stood when step ``until`` had been observed: no later checkpoint, metric or jump is in it.

    With ``signs`` its increments have random signs: A_t = A_0 + sum_i eps_i dA_i, and B_t with the same eps_i; a dense
    delta is sum_i eps_i x_i. Where nothing is to be changed, values are those of the run, bit for bit.
    """

    name = "past"

    def __init__(self, inner: CheckpointSource, until: int, signs: Signs | None = None, jumps: Jumps = ()) -> None:
        super().__init__()
        self.inner, self.until, self.signs, self.jumps = inner, until, signs, jumps
        self._steps = tuple(step for step in inner.steps if step <= until)
        self._course = Course(tuple(step for step in inner.steps if step > 0), tuple(step for step, _ in jumps))
        self._as_is = signs is None and all(made < until for made, _ in jumps)
        self._parts: tuple[str, Parts | None] | None = None

    def __reduce__(self) -> tuple[type[Past], tuple[Any, ...]]:
        return type(self), (self.inner, self.until, self.signs, self.jumps)

    @property
    def steps(self) -> tuple[int, ...]:
        return self._steps

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.inner.parameters

    @property
    def skipped(self) -> Mapping[str, str]:
        return self.inner.skipped

    def precision(self, name: str) -> torch.dtype:
        return self.inner.precision(name)

    def fingerprint(self, step: int | None) -> str | None:
        self._refuse_later(step)
        return self.inner.fingerprint(step) if self._as_is else None

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        self._refuse_later(step)
        return self.inner.metrics(step, since)

    def factors(self, name: str, step: int) -> LoraFactors | None:
        self._refuse_later(step)
        at = self.inner.factors(name, step)
        if at is None or self._as_is:
            return at
        return _WhenRead(lambda: self._sum(name, step))

    def start(self, name: str) -> LoraFactors | None:
        if self._as_is:
            return self.inner.start(name)
        parts = self._read(name)
        if parts is None or not parts.kept:
            return None
        if not parts.starts and not any(made < self.until for made, _ in self.jumps):
            return None
        first = self._sum(name, 0)
        return first if bool(first.B.any()) else None

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        self._refuse_later(step, since)
        if self._as_is:
            return self.inner.delta(name, step, since)
        if self._read(name) is None:
            return self._walked(name, step, since, self.inner.delta)
        start = self.start(name) if step > 0 else None
        return lora_delta(self._sum(name, step), start if since is None else self._sum(name, since))

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        self._refuse_later(step, since)
        if self._as_is:
            return self.inner.delta_rows(name, rows, step, since)
        if self._read(name) is not None:
            return super().delta_rows(name, rows, step, since)
        found = self._walked(name, step, since, lambda name, t, s: self.inner.delta_rows(name, rows, t, s))
        assert isinstance(found, Tensor)
        return found

    def _walked(
        self, name: str, step: int, since: int | None, read: Callable[[str, int, int | None], LowRank | Tensor]
    ) -> LowRank | Tensor:
        """sum_i eps_i x_i over the increments from ``since`` to ``step``; neighbours of one sign are read as one."""
        if since is not None and since > step:
            back = self._walked(name, since, step, read)
            return -back
        assert self.signs is not None
        signs = self.signs.of(name).tolist()
        begin: int | None = since
        runs: list[tuple[float, int | None, int]] = []
        for sign, end in zip(signs, self._course.steps, strict=True):
            if (since or 0) < end <= step:
                if runs and runs[-1][0] == sign:
                    runs[-1] = sign, runs[-1][1], end
                else:
                    runs.append((sign, begin, end))
                begin = end
        if not runs:
            return read(name, step, step if since is None else since)
        total: LowRank | Tensor | None = None
        for sign, before, after in runs:
            part = read(name, after, before)
            part = part.scale(sign) if isinstance(part, LowRank) else sign * part
            total = part if total is None else total + part  # type: ignore[operator]
        assert total is not None
        return total

    def _read(self, name: str) -> Parts | None:
        """The parts of a matrix; those of the last one are kept."""
        if self._parts is None or self._parts[0] != name:
            lora = any(parameter.name == name and parameter.rank is not None for parameter in self.parameters)
            parts = read_parts(self.inner, name, self._course.steps, self.jumps) if lora else None
            self._parts = name, parts
        return self._parts[1]

    def _sum(self, name: str, step: int) -> LoraFactors:
        parts = self._read(name)
        assert parts is not None
        return parts.factors(self._course.at(step, self.until) * self._course.signs(self.signs, name))

    def _refuse_later(self, *steps: int | None) -> None:
        later = [step for step in steps if step is not None and step > self.until]
        if later:
            raise CheckpointError(
                f"step {later[0]} lies after step {self.until}, where this view of the run ends; observed: {self.steps}"
            )


class _WhenRead(LoraFactors):
    """Factors that are computed once something is read of them: many callers only ask whether there are any."""

    def __init__(self, make: Callable[[], LoraFactors]) -> None:
        object.__setattr__(self, "_make", make)

    def __getattr__(self, field: str) -> Any:
        if field not in ("A", "B", "scaling"):
            raise AttributeError(field)
        made = self.__dict__["_make"]()
        for each in ("A", "B", "scaling"):
            object.__setattr__(self, each, getattr(made, each))
        return getattr(made, field)

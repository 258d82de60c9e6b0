"""What the checks of a backend look at: short runs of a trainer that the caller chose, with and without a jump."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from next_core.backend import Backend
from next_core.interfaces import Applied, CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.mathematics.low_rank import LowRank, dense
from next_core.run_config import RunConfig
from next_core.testing.check_runner import CheckError, ContractError, expect
from next_core.testing.source_checks import check_source

Weights = dict[str, Tensor]


@dataclass(eq=False)
class BackendCase:
    """A backend, and the run that it is to train, in fresh folders under ``folder``.

    ``run`` has at least 4 steps; a checkpoint is taken after each. With ``run.save_every`` below ``run.steps``
    resuming is checked too. The checks train the run about ten times, so it should take seconds; a case that is kept
    (a fixture of module scope) shares what several of them look at.
    """

    plugin: Backend
    run: RunConfig
    folder: Path

    def make(self) -> Backend:
        """A fresh one of the same settings."""
        return type(self.plugin)(self.plugin.config)

    @contextlib.contextmanager
    def prepared(self, name: str, resume: bool = False) -> Iterator[tuple[Backend, int]]:
        """A backend that was started in a folder of this name, and the step it goes on from; closed at the end."""
        expect(self.run.steps >= 4, "a run of at least 4 steps to check a backend with", self.run.steps)
        out = self.folder / name
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        backend = self.make()
        try:
            step = backend.prepare(self.run, out, resume)
            backend.start()
            yield backend, step
        finally:
            backend.close()

    def train(self, backend: Backend, actions: Mapping[int, Callable[[], None]], begin: int = 0) -> list[int]:
        """Train to the end, a checkpoint after each step, then what is to be done there. Returns the reported steps."""
        reported: list[int] = []

        def act(step: int) -> None:
            backend.observe(step)
            actions.get(step, nothing)()

        def step_ended(step: int) -> None:
            reported.append(step)
            if backend.in_process:
                act(step)

        if backend.in_process:
            backend.train(self.run.steps, step_ended)
        else:
            for step in range(begin + 1, self.run.steps + 1):
                backend.train(step, step_ended)
                act(step)
        return reported

    @functools.cached_property
    def plain(self) -> Plain:
        """What was seen of a run without jumps."""
        with self.prepared("plain") as (backend, _):
            seen: list[tuple[int, ...]] = []
            every = range(1, self.run.steps + 1)
            reported = self.train(backend, dict.fromkeys(every, lambda: seen.append(backend.source().steps)))
            source = backend.source()
            trouble: ContractError | None = None
            try:
                check_source(source)
            except ContractError as error:
                trouble = error
            moved = any(bool(dense(source.delta(p.name, every[-1], 1)).any()) for p in source.parameters)
            return Plain(reported, seen, trouble, moved, stands(source, every[-1]), backend.notes)

    @functools.cached_property
    def jumped(self) -> Jumped:
        """What was seen of a run with a jump after step 2."""
        with self.prepared("jumped") as (backend, _):
            jump = Jump(backend)
            self.train(backend, {2: jump})
            source = backend.source()
            assert jump.made is not None
            between = {name: dense(source.delta(name, 2, 1)).double() for name in jump.made.wanted}
            since = {name: dense(source.delta(name, 3, 2)).double() for name in jump.made.wanted}
            return Jumped(jump.made, between, since, stands(source, self.run.steps))


@dataclass(frozen=True)
class Plain:
    """Of a run without jumps: the reported steps, those visible after each, and how it ended."""

    reported: list[int]
    visible: list[tuple[int, ...]]
    trouble: ContractError | None
    moved: bool
    end: Weights
    notes: Sequence[str]


@dataclass(frozen=True)
class Made:
    """A jump: how each matrix is to move and by which kind of update, and where all stood before and after."""

    kinds: Mapping[str, str]
    wanted: Weights
    before: Weights
    between: Weights
    after: Weights
    applied: Applied


@dataclass(frozen=True)
class Jumped:
    """Of a run with a jump: the motion from step 1 to 2 and from 2 to 3 as its source tells it, and its end."""

    made: Made
    between: Weights
    since: Weights
    end: Weights


def _low_rank(source: CheckpointSource, name: str, step: int) -> Update:
    m, n = next(parameter.shape for parameter in source.parameters if parameter.name == name)
    size = dense(source.delta(name, step)).double().norm() / (m * n) ** 0.5
    return LowRankUpdate(LowRank(size * torch.ones(m, 1, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)))


UPDATES: Mapping[str, Callable[[CheckpointSource, str, int], Update]] = {
    "factor-space": lambda source, name, step: CoefficientUpdate({step: 1.0, step - 1: -1.0}, "factors"),
    "merged-space": lambda source, name, step: CoefficientUpdate({step: 1.0, step - 1: -1.0}, "merged"),
    "low-rank": _low_rank,
}


class Jump:
    """When called, a jump after step 2 with alpha 2, each matrix by another kind of update; ``made`` tells of it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: Made | None = None

    def __call__(self) -> None:
        source = self.backend.source()
        prediction = three_kinds(source, 2)
        names = list(prediction.updates)
        before = stands(source, 2)
        between = {name: dense(source.delta(name, 2, 1)).double().clone() for name in names}
        wanted = {name: _wanted(prediction, name, 2.0) for name in names}
        applied: object = self.backend.apply_jump(prediction, 2.0)
        if not isinstance(applied, Applied):
            raise CheckError("extend answers with an Applied", type(applied).__name__)
        kinds = dict(zip(names, UPDATES, strict=False))
        self.made = Made(kinds, wanted, before, between, stands(self.backend.source(), 2), applied)


def stands(source: CheckpointSource, step: int) -> Weights:
    """Where each matrix stands at a step, counted from the backbone."""
    return {p.name: dense(source.position(p.name, step)).double().clone() for p in source.parameters}


def three_kinds(source: CheckpointSource, step: int) -> Prediction:
    made = zip(moving(source), UPDATES.values(), strict=False)
    return Prediction(source, step, 1, updates={name: update(source, name, step) for name, update in made})


def _wanted(prediction: Prediction, name: str, alpha: float) -> Tensor:
    """By how much a matrix is to move, by the words of the interface."""
    source, step, update = prediction.source, prediction.step, prediction.updates[name]
    if isinstance(update, LowRankUpdate):
        return alpha * update.matrix.dense().double()
    now, then = source.factors(name, step), source.factors(name, step - 1)
    if update.space == "merged" or now is None or then is None:
        return alpha * dense(source.delta(name, step, step - 1)).double()
    A, B, A_1, B_1 = (x.double() for x in (now.A, now.B, then.A, then.B))
    return now.scaling * ((B + alpha * (B - B_1)) @ (A + alpha * (A - A_1)) - B @ A)


def moving(source: CheckpointSource) -> list[str]:
    """The first matrices that moved, one for each kind of update if there are so many."""
    first, last = source.steps[0], source.steps[-1]
    found = [p.name for p in source.parameters if bool(dense(source.delta(p.name, last, first)).any())]
    expect(bool(found), f"a run in which matrices move from step {first} to {last}", "none does")
    return found[: len(UPDATES)]


def first_difference(one: Weights, other: Weights) -> str | None:
    return next((name for name, value in one.items() if not torch.equal(value, other[name])), None)


def nothing(*_: object) -> None:
    pass

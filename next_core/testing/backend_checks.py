"""Checks of backends: the promises of ``Backend``, tested on short runs of a trainer that the caller chooses."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from next_core.backend import Backend
from next_core.errors import NextCoreError
from next_core.interfaces import Applied, CheckpointSource, CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.mathematics.low_rank import LowRank, dense
from next_core.run_config import RunConfig
from next_core.testing.check_runner import DoesNotApply, expect, expect_raises
from next_core.testing.plugin_checks import check_set
from next_core.testing.source_checks import check_source

Weights = dict[str, Tensor]
Split = Literal["validation", "test"]
ALPHA = 2.0
"""The alpha of the jumps that the checks make."""


@dataclass(eq=False)
class BackendCase:
    """A backend and the run that it is to train, in new folders under ``folder``.

    ``run`` has at least 4 steps; a checkpoint is taken after each. Resuming is checked only where ``run.save_every`` is
    below ``run.steps``. The checks train the run about ten times, so it should take seconds. Keep the case (in a
    fixture of module scope): several checks share its plain run.
    """

    plugin: Backend
    run: RunConfig
    folder: Path

    @contextlib.contextmanager
    def prepared(self, name: str, resume: bool = False) -> Iterator[tuple[Backend, int]]:
        """Start a backend in the folder ``name``, yield it and the step it starts from, and close it at the end."""
        expect(self.run.steps >= 4, "a run of at least 4 steps to check a backend with", self.run.steps)
        out = self.folder / name
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        backend = type(self.plugin)(self.plugin.config)
        try:
            step = backend.prepare(self.run, out, resume)
            backend.start()
            yield backend, step
        finally:
            backend.close()

    def train(self, backend: Backend, actions: Mapping[int, Callable[[], object]], begin: int = 0) -> list[int]:
        """Train to the end with a checkpoint, then the step's action, after each step. Returns the reported steps."""
        reported: list[int] = []

        def after(step: int) -> None:
            backend.observe(step)
            if step in actions:
                actions[step]()

        def step_ended(step: int) -> None:
            reported.append(step)
            if backend.in_process:
                after(step)

        if backend.in_process:
            backend.train(self.run.steps, step_ended)
        else:
            for step in range(begin + 1, self.run.steps + 1):
                backend.train(step, step_ended)
                after(step)
        return reported

    @functools.cached_property
    def plain_end(self) -> Weights:
        """Where each matrix is at the end of a run without jumps."""
        with self.prepared("plain") as (backend, _):
            self.train(backend, {})
            return positions(backend.source(), self.run.steps)


CHECKS = check_set("backend", Backend)
check = CHECKS.add


def check_backend(case: BackendCase, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of a backend. ``expected_failures`` and errors: see ``check_predictor``."""
    CHECKS.run(f"backend '{case.plugin.name}'", case, expected_failures)


@check
def prepares_describes_and_closes(case: BackendCase) -> None:
    """`describe` returns plain values and writes nothing; `prepare` returns 0; `close` works at any time, and twice."""
    backend, out = type(case.plugin)(case.plugin.config), case.folder / "describes"
    json.dumps(dict(backend.describe(case.run, out)))
    expect(not out.exists(), "describe writes nothing", f"{out} was created")
    backend.close()
    with case.prepared("prepares") as (backend, step):
        expect(step == 0 and isinstance(step, int), "prepare of a new run returns 0", repr(step))
        notes = backend.notes
        expect(not isinstance(notes, str) and all(isinstance(n, str) for n in notes), "a list of notes", repr(notes))
        backend.close()


@check
def observed_steps_become_checkpoints(case: BackendCase) -> None:
    """Steps are reported in order, `observe` makes each visible in `source()`, which passes the checks of sources."""
    steps = list(range(1, case.run.steps + 1))
    with case.prepared("observed") as (backend, _):
        seen: list[tuple[int, ...]] = []
        reported = case.train(backend, dict.fromkeys(steps, lambda: seen.append(backend.source().steps)))
        if backend.in_process:
            expect(reported == steps, f"step_ended is called with {steps}", reported)
        else:
            good = set(reported) <= set(steps) and all(a < b for a, b in itertools.pairwise(reported))
            expect(good, f"step_ended is called with some of {steps}, ascending", reported)
        wanted = [tuple(range(1, step + 1)) for step in steps]
        expect(seen == wanted, f"source() has the steps {wanted} after each step", seen)
        check_source(backend.source())


@check
def a_jump_moves_the_weights_and_not_the_history(case: BackendCase) -> None:
    """`apply_jump` moves the weights by alpha times the prediction; deltas between checkpoints do not contain it."""
    with case.prepared("jumped") as (backend, _):
        before: dict[str, Tensor] = {}
        jumps: list[Jump] = []

        def jump() -> None:
            source = backend.source()
            before.update({p.name: dense(source.delta(p.name, 2, 1)).double().clone() for p in source.parameters})
            jumps.append(Jump(backend, 2))

        case.train(backend, {2: jump})
        source, (made,) = backend.source(), jumps
        for name, wanted in made.wanted.items():
            by = made.after[name] - made.before[name]
            error, size = float((by - wanted).norm()), float(made.before[name].norm() + wanted.norm())
            seen = f"it moved by {float(by.norm()):.3g}, with an error of {error:.3g}"
            expect(error <= 1e-3 * size, f"a jump of '{name}' by {float(wanted.norm()):.3g}", seen)
            for what, extra in (
                (f"from step 1 to 2 of '{name}', as before the jump", dense(source.delta(name, 2, 1)) - before[name]),
                (f"from step 2 to 3 of '{name}', without the jump", dense(source.delta(name, 3, 2))),
            ):
                # In factor space equal moves of A and B give a slightly different product, but not half a jump.
                share = float((extra * wanted).sum() / wanted.square().sum())
                expect(abs(share) < 0.5, f"a delta {what}", f"it contains {share:.2f} of the jump")
        end = positions(source, case.run.steps)
    expect(_first_difference(made.after, end) is not None, "training continues after a jump", "no matrix has moved")


@check
def an_immediate_rollback_undoes_the_jump(case: BackendCase) -> None:
    """After `rollback` at the jump's own step, the run ends bit for bit where a run without the jump does."""
    with case.prepared("again") as (backend, _):
        case.train(backend, {})
        again = positions(backend.source(), case.run.steps)
    if _first_difference(case.plain_end, again) is not None:
        raise DoesNotApply("two runs with one seed differ, so there is nothing to compare a third with")
    with case.prepared("back") as (backend, _):

        def there_and_back() -> None:
            made = Jump(backend, 2)
            backend.rollback(made.applied, 2)
            _expect_equal(made.before, positions(backend.source(), 2), "rollback restores every matrix, bit for bit")

        case.train(backend, {2: there_and_back})
        end = positions(backend.source(), case.run.steps)
    _expect_equal(case.plain_end, end, "a run whose jump was rolled back ends as the plain run")


@check
def a_later_rollback_restarts_the_history(case: BackendCase) -> None:
    """`rollback` after more steps restores the weights from before the jump, and the history restarts there."""
    with case.prepared("later") as (backend, _):
        jumps: list[Jump] = []

        def back() -> None:
            backend.rollback(jumps[0].applied, 3)
            backend.observe(3)
            source = backend.source()
            expect(source.steps == (3,), "a history that restarts at step 3", source.steps)
            _expect_equal(jumps[0].before, positions(source, 3), "the weights from before the jump, bit for bit")

        case.train(backend, {2: lambda: jumps.append(Jump(backend, 2)), 3: back})


@check
def a_bad_jump_changes_nothing(case: BackendCase) -> None:
    """A prediction that is not finite is an error of next-core, the weights do not change, and training continues."""
    with case.prepared("bad") as (backend, _):

        def jump_by_nan() -> None:
            source = backend.source()
            before, names = positions(source, 2), list(one_update_of_each_kind(source, 2))
            updates = dict.fromkeys(names, CoefficientUpdate({2: 1.0, 1: -1.0}))
            updates[names[-1]] = CoefficientUpdate({2: math.nan, 1: 1.0})
            bad = Prediction(source, 2, 1, updates=updates)
            expect_raises(NextCoreError, lambda: backend.apply_jump(bad, 1.0), "apply_jump with NaN")
            _expect_equal(before, positions(backend.source(), 2), "a refused jump moves no matrix")

        case.train(backend, {2: jump_by_nan})
        steps = backend.source().steps
    expect(steps[-1] == case.run.steps, f"training continues to step {case.run.steps}", steps)


@check
def active_jumps_are_those_that_were_kept(case: BackendCase) -> None:
    """`active_jump` returns the jump made after a step with `keep`, and None for other steps."""
    with case.prepared("active") as (backend, _):
        found: list[Applied | None] = []
        actions: dict[int, Callable[[], object]] = {
            2: lambda: Jump(backend, 2, keep=True),
            3: lambda: Jump(backend, 3),
            4: lambda: found.extend(backend.active_jump(step) for step in (1, 2, 3)),
        }
        case.train(backend, actions)
    none, kept, not_kept = found
    good = isinstance(kept, Applied) and none is None and not_kept is None
    expect(good, "an Applied at step 2, and None at step 1 (no jump) and step 3 (not kept)", found)


@check
def accuracies_are_shares(case: BackendCase) -> None:
    """`evaluate` returns None or a number in [0, 1], the same again, and the first of `accuracies`."""
    with case.prepared("accuracies") as (backend, _):

        def look() -> None:
            for split in get_args(Split):
                found, again = backend.evaluate(split), backend.evaluate(split)
                expect(found == again, f"the same accuracy on '{split}' when asked again", f"{found}, {again}")
                each = backend.accuracies(split)
                expect(set(each) <= {"sampled", "greedy"}, "accuracies 'sampled' and 'greedy'", sorted(each))
                values = [value for value in (found, *each.values()) if value is not None]
                expect(all(0 <= value <= 1 for value in values), f"accuracies on '{split}' in [0, 1]", values)
                first = next(iter(each.values()), None)
                expect(first == found, f"evaluate returns the first of accuracies('{split}'): {first}", found)

        case.train(backend, {2: look})


@check
def resumes_from_the_last_save(case: BackendCase) -> None:
    """`prepare(resume=True)` continues from the last saved step; with `exact_resume`, to exactly the same weights."""
    every = case.run.save_every
    if every is None or every >= case.run.steps:
        raise DoesNotApply("the run saves nothing to resume from: set save_every below steps")

    class Killed(Exception):  # noqa: N818 - stands for the end of the process
        pass

    def kill() -> None:
        raise Killed

    with contextlib.suppress(Killed), case.prepared("resumed") as (backend, _):
        case.train(backend, {every + 1: kill})
    with case.prepared("resumed", resume=True) as (backend, step):
        expect(step == every, f"a run that was killed after step {every + 1} resumes from step {every}", step)
        reported, rest = case.train(backend, {}, begin=step), list(range(step + 1, case.run.steps + 1))
        expect(reported == rest or not backend.in_process, f"step_ended is called with {rest}", reported)
        source = backend.source()
        expect(source.steps[-1] == case.run.steps, f"checkpoints up to step {case.run.steps}", source.steps)
        end = positions(source, case.run.steps)
    if case.plugin.exact_resume:
        _expect_equal(case.plain_end, end, "exact_resume: a resumed run ends bit for bit as an uninterrupted one")


class Jump:
    """A jump after a step: what it is to move each matrix by, and where each matrix was before and is after it."""

    def __init__(self, backend: Backend, step: int, keep: bool = False) -> None:
        source = backend.source()
        prediction = Prediction(source, step, 1, updates=one_update_of_each_kind(source, step))
        self.wanted = {name: dense(prediction.delta(name, ALPHA)).double() for name in prediction.updates}
        self.before = positions(source, step)
        self.applied = backend.apply_jump(prediction, ALPHA, keep)
        expect(isinstance(self.applied, Applied), "apply_jump returns an Applied", type(self.applied).__name__)
        self.after = positions(backend.source(), step)


def positions(source: CheckpointSource, step: int) -> Weights:
    """Return where each matrix is at a step, counted from the backbone."""
    return {p.name: dense(source.position(p.name, step)).double().clone() for p in source.parameters}


def one_update_of_each_kind(source: CheckpointSource, step: int) -> dict[str, Update]:
    """Return an update in factor space, one in merged space and a low-rank one, for the first matrices that moved."""
    first, last = source.steps[0], source.steps[-1]
    moving = [p for p in source.parameters if bool(dense(source.delta(p.name, last, first)).any())]
    expect(bool(moving), f"a run in which matrices move from step {first} to step {last}", "none moves")
    secant = {step: 1.0, step - 1: -1.0}
    updates: dict[str, Update] = {p.name: CoefficientUpdate(secant, "merged") for p in moving[:2]}
    updates[moving[0].name] = CoefficientUpdate(secant, "factors")
    for name, (m, n) in ((p.name, p.shape) for p in moving[2:3]):
        size = dense(source.delta(name, step)).double().norm() / (m * n) ** 0.5
        updates[name] = LowRankUpdate(LowRank(size * torch.ones(m, 1).double(), torch.ones(1, n).double()))
    return updates


def _first_difference(one: Weights, other: Weights) -> str | None:
    return next((name for name, value in one.items() if not torch.equal(value, other[name])), None)


def _expect_equal(wanted: Weights, found: Weights, what: str) -> None:
    difference = _first_difference(wanted, found)
    expect(difference is None, what, f"'{difference}' differs")

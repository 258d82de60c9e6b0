"""Checks of backends: the promises of ``Backend``, tested on short runs of a trainer that the caller chooses."""

import contextlib
import functools
import itertools
import math
import shutil
import unittest
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor

from next_core.backend import Backend
from next_core.errors import NextCoreError
from next_core.interfaces import Applied, CheckpointSource, CoefficientUpdate, Prediction, Update
from next_core.mathematics.low_rank import dense
from next_core.run_config import RunConfig
from next_core.testing.check_runner import checks_for, expect, expect_equal, expect_raises, run_checks
from next_core.testing.source_checks import check_source
from next_core.types import Space

Weights = dict[str, Tensor]
Action = Callable[[Backend], object]
ALPHA = 2.0  # The alpha of the jumps that the checks make


@dataclass(eq=False)
class BackendCase:
    """A backend and the run that it is to train, in new folders under ``folder``.

    ``run`` has at least 4 steps; a checkpoint is taken after each. Resuming is checked only where ``run.save_every`` is
    below ``run.steps``. The checks train the run about six times, so it should take seconds. Keep the case (in a
    fixture of module scope): several checks share its plain run.
    """

    plugin: Backend
    run: RunConfig
    folder: Path

    def train(
        self, name: str, actions: Mapping[int, Action], resume: bool = False, follow_steps: bool = False
    ) -> tuple[int, list[int]]:
        """Train to the end in the folder ``name``, with a checkpoint, then the step's action, after each step.

        Returns the step that the trainer started from, and those that it reported.
        """
        expect(self.run.steps >= 4, "a run of at least 4 steps to check a backend with", self.run.steps)
        backend, reported = type(self.plugin)(self.plugin.config), list[int]()
        if not resume:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True, exist_ok=True)

        def after(step: int) -> None:
            if follow_steps:
                backend.steps.after_step()
            backend.observe(step)
            if step in actions:
                actions[step](backend)

        def step_ended(step: int) -> None:
            reported.append(step)
            if backend.in_process:
                after(step)

        try:
            begin = backend.prepare(self.run, self.folder / name, resume)
            backend.start()
            if follow_steps:
                backend.follow_steps([2])
            if backend.in_process:
                backend.train(self.run.steps, step_ended)
            else:
                for step in range(begin + 1, self.run.steps + 1):
                    backend.train(step, step_ended)
                    after(step)
        finally:
            backend.close()
        return begin, reported

    @functools.cached_property
    def plain(self) -> dict[int, Weights]:
        """Where each matrix is at each step of a run without jumps."""
        found: dict[int, Weights] = {}
        self.train("plain", {step: functools.partial(_note, found, step) for step in range(1, self.run.steps + 1)})
        return found


check = checks_for("backend")


def check_backend(case: BackendCase) -> None:
    """Run every check of a backend. Raises an ``ExceptionGroup`` of all failures."""
    run_checks("backend", case.plugin.name, case)


@check
def observed_steps_become_checkpoints(case: BackendCase) -> None:
    """Steps are reported in order, `observe` makes each visible in `source()`, which passes the checks of sources.

    `evaluate` returns None or a number in [0, 1].
    """
    steps, seen = list(range(1, case.run.steps + 1)), list[tuple[int, ...]]()

    def look(backend: Backend) -> None:
        seen.append(backend.source().steps)
        if len(seen) == len(steps):
            check_source(backend.source())
            accuracy = backend.evaluate("validation")
            expect(accuracy is None or 0 <= accuracy <= 1, "None or an accuracy in [0, 1]", accuracy)

    begin, reported = case.train("observed", dict.fromkeys(steps, look))
    expect(begin == 0, "prepare of a new run returns 0", begin)
    good = set(reported) <= set(steps) and all(a < b for a, b in itertools.pairwise(reported))
    good = reported == steps if case.plugin.in_process else good  # a trainer driven by segments may report some only
    expect(good, f"step_ended is called with {steps}", reported)
    wanted = [tuple(steps[:count]) for count in steps]
    expect(seen == wanted, f"source() has the steps {wanted} after each step", seen)


@check
def a_jump_moves_the_weights_and_not_the_history(case: BackendCase) -> None:
    """`apply_jump` moves the weights by alpha times the prediction; deltas between checkpoints do not contain it.

    A prediction that is not finite is an error of next-core and moves nothing. Training continues after both.
    """
    before: Weights = {}
    jumps: list[Jump] = []

    def jump(backend: Backend) -> None:
        source, there = backend.source(), _positions(backend, 2)
        before.update({name: dense(source.delta(name, 2, 1)).double().clone() for name in there})
        updates = _updates(source, 2) | {max(there): CoefficientUpdate({2: math.nan, 1: 1.0})}
        bad = Prediction(source, 2, 1, updates=updates)
        expect_raises(NextCoreError, lambda: backend.apply_jump(bad, 1.0), "apply_jump with NaN")
        expect_equal(there, _positions(backend, 2), "a refused jump moves no matrix")
        jumps.append(Jump(backend, 2))

    def compare(backend: Backend) -> None:
        source, (made,) = backend.source(), jumps
        for name, wanted in made.wanted.items():
            by = made.after[name] - made.before[name]
            error, size = float((by - wanted).norm()), float(made.before[name].norm() + wanted.norm())
            expect(error <= 1e-3 * size, f"a jump of '{name}' by {float(wanted.norm()):.3g}", f"{error:.3g} off")
            for what, extra in (
                (f"from step 1 to 2 of '{name}', as before the jump", dense(source.delta(name, 2, 1)) - before[name]),
                (f"from step 2 to 3 of '{name}', without the jump", dense(source.delta(name, 3, 2))),
            ):
                # In factor space equal moves of A and B give a slightly different product, but not half a jump.
                share = float((extra * wanted).sum() / wanted.square().sum())
                expect(abs(share) < 0.5, f"a delta {what}", f"it contains {share:.2f} of the jump")

    case.train("jumped", {2: jump, 3: compare})


@check
def rollback_undoes_the_jump(case: BackendCase) -> None:
    """`rollback` restores the weights, bit for bit; after more steps, the history restarts there.

    At the jump's own step it leaves no trace: with `exact_resume`, training continues as without the jump. A kept jump
    is found by `active_jump`.
    """
    jumps: list[Jump] = []

    def there_and_back(backend: Backend) -> None:
        made = Jump(backend, 2)
        backend.rollback(made.applied, 2)
        expect_equal(made.before, _positions(backend, 2), "an immediate rollback restores every matrix")

    def there(backend: Backend) -> None:
        if case.plugin.exact_resume:
            now, what = _positions(backend, 3), "the step after an immediate rollback is that of the plain run"
            expect_equal(case.plain[3], now, what)
        jumps.append(Jump(backend, 3))

    def back(backend: Backend) -> None:
        none, kept = (backend.active_jump(step) for step in (1, 3))
        good = none is None and isinstance(kept, Applied)
        expect(good, "active_jump: None for step 1 (no jump), an Applied for step 3", (none, kept))
        backend.rollback(jumps[0].applied, 4)
        backend.observe(4)
        expect(backend.source().steps == (4,), "a history that restarts at step 4", backend.source().steps)
        expect_equal(jumps[0].before, _positions(backend, 4), "the weights from before the jump")

    case.train("back", {2: there_and_back, 3: there, 4: back})


@check
def steps_are_multiplied_averaged_and_undone(case: BackendCase) -> None:
    """With `scales_steps`, `steps` multiplies the steps that follow, goes to a mean, and returns to a kept state.

    A multiple of 1 changes nothing.
    """
    found: dict[int, Weights] = {}
    if not case.plugin.scales_steps:
        expect_raises(NextCoreError, lambda: case.plugin.follow_steps([]), "follow_steps without scales_steps")
        return

    def shrink(backend: Backend) -> None:
        _note(found, 2, backend)
        backend.steps.keep(2)
        backend.steps.multiple = 1e-6

    def undo(backend: Backend) -> None:
        _note(found, 3, backend)
        applied = backend.steps.apply_mean(2)
        backend.observe(3)
        mean = _positions(backend, 3)
        expect(_distance(mean, found[3]) > 0, "apply_mean moves the weights", "no matrix moved")
        applied.rollback()
        backend.observe(3)
        expect_equal(found[3], _positions(backend, 3), "the rollback of a mean restores every matrix")
        backend.steps.undo(2)
        backend.observe(3)
        expect_equal(found[2], _positions(backend, 3), "undo restores every matrix as it was kept")

    case.train("scaled", {2: shrink, 3: undo}, follow_steps=True)
    if case.plugin.exact_resume:
        expect_equal(case.plain[2], found[2], "a multiple of 1 changes nothing")
    whole, small = _distance(case.plain[3], case.plain[2]), _distance(found[3], found[2])
    expect(small <= 1e-3 * whole, "a step with the multiple 1e-6 moves a millionth as far", f"{small / whole:.2g}")


@check
def resumes_from_the_last_save(case: BackendCase) -> None:
    """`prepare(resume=True)` continues from the last saved step; with `exact_resume`, to exactly the same weights."""
    every, last, end = case.run.save_every, case.run.steps, dict[int, Weights]()
    if every is None or every >= last:
        raise unittest.SkipTest("the run saves nothing to resume from: set save_every below steps")

    def kill(backend: Backend) -> None:
        raise InterruptedError

    with contextlib.suppress(InterruptedError):
        case.train("resumed", {every + 1: kill})
    begin, _ = case.train("resumed", {last: functools.partial(_note, end, last)}, resume=True)
    expect(begin == every, f"a run that was killed after step {every + 1} resumes from step {every}", begin)
    if case.plugin.exact_resume:
        expect_equal(case.plain[last], end[last], "exact_resume: a resumed run ends as an uninterrupted one")


class Jump:
    """A jump after a step: what it is to move each matrix by, and where each matrix was before and is after it."""

    def __init__(self, backend: Backend, step: int) -> None:
        prediction = Prediction(backend.source(), step, 1, updates=_updates(backend.source(), step))
        self.wanted = {name: dense(prediction.delta(name, ALPHA)).double() for name in prediction.updates}
        self.before = _positions(backend, step)
        self.applied = backend.apply_jump(prediction, ALPHA, keep=True)
        self.after = _positions(backend, step)


def _updates(source: CheckpointSource, step: int) -> dict[str, Update]:
    """Return an update in factor space and one in merged space, for the first matrices that moved."""
    first, last = source.steps[0], source.steps[-1]
    moving = [p.name for p in source.parameters if dense(source.delta(p.name, last, first)).any()]
    expect(bool(moving), f"a run in which matrices move from step {first} to step {last}", "none moves")
    secant = {step: 1.0, step - 1: -1.0}
    return {name: CoefficientUpdate(secant, space) for name, space in zip(moving, get_args(Space), strict=False)}


def _positions(backend: Backend, step: int) -> Weights:
    """Return where each matrix is at a step, counted from the backbone."""
    source = backend.source()
    return {p.name: dense(source.position(p.name, step)).double().clone() for p in source.parameters}


def _distance(one: Weights, other: Weights) -> float:
    return math.sqrt(sum(float((one[name] - value).square().sum()) for name, value in other.items()))


def _note(found: dict[int, Weights], step: int, backend: Backend) -> None:
    found[step] = _positions(backend, step)

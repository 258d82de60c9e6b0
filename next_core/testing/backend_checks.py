"""Checks of backends: what ``Backend`` says in words."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Final, Literal

from next_core.errors import NextCoreError
from next_core.interfaces import Applied, CoefficientUpdate, Prediction
from next_core.testing.backend_case import BackendCase, Jump, first_difference, moving, nothing, stands, three_kinds
from next_core.testing.check_runner import DoesNotApply, expect, raises, register, run_checks
from next_core.testing.plugin_checks import register_common

KIND: Final = "backend"


def _case(case: BackendCase) -> BackendCase:
    return case


register_common(KIND, _case)
check = register(KIND, _case)


def check_backend(case: BackendCase, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of a backend. ``expected_failures`` and errors: see ``check_predictor``."""
    run_checks(KIND, case, case, expected_failures, f"backend '{case.plugin.name}'")


@check
def describes_without_starting(case: BackendCase) -> None:
    """`describe` gives plain values for a dry run, before `prepare`, and writes nothing."""
    out = case.folder / "describes"
    facts = case.make().describe(case.run, out)
    json.dumps(dict(facts))
    expect(not out.exists(), "nothing is written by describe", "its folder is there")


@check
def prepares_a_new_run_at_step_zero(case: BackendCase) -> None:
    """`prepare` of a new run returns 0."""
    with case.prepared("prepares") as (_, step):
        expect(step == 0 and isinstance(step, int), "prepare returns 0 for a new run", repr(step))


@check
def closes_at_any_time(case: BackendCase) -> None:
    """`close` may be called before `prepare`, and again."""
    backend = case.make()
    backend.close()
    backend.close()
    with case.prepared("closes") as (backend, _):
        backend.close()


@check
def reports_the_steps(case: BackendCase) -> None:
    """Trainers in this process report every step, once and in order; others report some of them, in order."""
    every, reported = list(range(1, case.run.steps + 1)), case.plain.reported
    if case.plugin.in_process:
        expect(reported == every, f"step_ended is told of steps {every}", reported)
    else:
        good = set(reported) <= set(every) and all(a < b for a, b in itertools.pairwise(reported))
        expect(good, f"step_ended is told of some of {every}, ascending", reported)


@check
def observing_makes_a_step_visible(case: BackendCase) -> None:
    """After `observe` a step is in `source()`, and not before."""
    for step, seen in enumerate(case.plain.visible, 1):
        expect(seen == tuple(range(1, step + 1)), f"steps 1 to {step} in source() after step {step}", seen)


@check
def its_source_is_a_good_one(case: BackendCase) -> None:
    """What `source()` gives passes the checks of sources."""
    if case.plain.trouble is not None:
        raise case.plain.trouble


@check
def training_moves_the_weights(case: BackendCase) -> None:
    """RL steps move some matrix, as the checkpoints show."""
    expect(case.plain.moved, f"a matrix that differs between steps 1 and {case.run.steps}", "none does")


@check
def notes_are_texts(case: BackendCase) -> None:
    """`notes` are texts."""
    notes = case.plain.notes
    expect(not isinstance(notes, str) and all(isinstance(n, str) for n in notes), "texts", repr(notes))


@check
def a_jump_lands_and_training_goes_on(case: BackendCase) -> None:
    """`extend` moves the weights by alpha times the prediction, in each way that an update can be made; RL goes on."""
    made = case.jumped.made
    for name, wanted in made.wanted.items():
        by = made.after[name] - made.before[name]
        error, size = float((by - wanted).norm()), float(made.before[name].norm() + wanted.norm())
        seen = f"moved by {float(by.norm()):.3g}, off by {error:.3g}"
        expect(error <= 1e-3 * size, f"a {made.kinds[name]} jump of '{name}' by {float(wanted.norm()):.3g}", seen)
    still = first_difference(made.after, case.jumped.end) is None
    expect(not still, "training goes on after a jump", "no matrix has moved since")


@check
def the_history_shows_rl_and_not_the_jump(case: BackendCase) -> None:
    """After a jump, the deltas between checkpoints before it, and to those after it, are what training did."""
    made = case.jumped.made
    for name, wanted in made.wanted.items():
        kind, length = made.kinds[name], wanted.square().sum()
        # In factor space the same moves of A and B make a slightly different product: half a jump is far off.
        for found, right, what in (
            (case.jumped.between[name], made.between[name], "from step 1 to 2, as before the jump"),
            (case.jumped.since[name], None, "from step 2 to 3, without the jump"),
        ):
            by = found if right is None else found - right
            share = float((by * wanted).sum() / length)
            expect(abs(share) < 0.5, f"a delta of '{name}' {what} ({kind})", f"it has {share:.2f} of the jump in it")


@check
def a_jump_taken_back_at_once_never_was(case: BackendCase) -> None:
    """`rollback` at the jump's own step: the run ends bit for bit where the one without a jump does."""
    with case.prepared("again") as (backend, _):
        case.train(backend, {})
        again = stands(backend.source(), case.run.steps)
    if first_difference(case.plain.end, again) is not None:
        raise DoesNotApply("two runs of one seed do not agree bit for bit: nothing can be told from a third")
    with case.prepared("back") as (backend, _):

        def there_and_back() -> None:
            jump = Jump(backend)
            jump()
            assert jump.made is not None
            backend.rollback(jump.made.applied, 2)
            different = first_difference(jump.made.before, stands(backend.source(), 2))
            expect(different is None, "every matrix where it was, bit for bit", f"'{different}' is elsewhere")

        case.train(backend, {2: there_and_back})
        different = first_difference(case.plain.end, stands(backend.source(), case.run.steps))
    expect(different is None, "a run with a jump taken back ends as the plain one", f"'{different}' ends elsewhere")


@check
def a_jump_can_be_taken_back_later(case: BackendCase) -> None:
    """`rollback` after further steps: the history starts anew there, and the weights are those from before the jump."""
    with case.prepared("later") as (backend, _):
        jump = Jump(backend)

        def back() -> None:
            assert jump.made is not None
            backend.rollback(jump.made.applied, 3)
            backend.observe(3)
            source = backend.source()
            expect(source.steps == (3,), "a history that starts anew at step 3", source.steps)
            different = first_difference(jump.made.before, stands(source, 3))
            expect(different is None, "weights from before the jump, bit for bit", f"'{different}' is elsewhere")

        case.train(backend, {2: jump, 3: back})


@check
def a_bad_jump_changes_nothing(case: BackendCase) -> None:
    """A prediction that is not finite is an error of next-core, after which the run goes on as a plain one."""
    with case.prepared("bad") as (backend, _):

        def jump() -> None:
            source = backend.source()
            before, names = stands(source, 2), moving(source)
            updates = {name: CoefficientUpdate({2: 1.0, 1: -1.0}) for name in names}
            updates[names[-1]] = CoefficientUpdate({2: math.nan, 1: 1.0})
            bad = Prediction(source, 2, 1, updates=updates)
            raises(NextCoreError, lambda: backend.apply_jump(bad, 1.0), "extend by NaN")
            different = first_difference(before, stands(backend.source(), 2))
            expect(different is None, "weights as before the refused jump", f"'{different}' moved")

        case.train(backend, {2: jump})
        steps = backend.source().steps
    expect(steps[-1] == case.run.steps, f"training to step {case.run.steps}", steps)


@check
def standing_jumps_are_found_where_they_were_kept(case: BackendCase) -> None:
    """`standing` is the jump made after a step with `keep`, and None where none was made or nothing kept."""
    with case.prepared("standing") as (backend, _):
        found: dict[int, Applied | None] = {}

        def jump(keep: bool, step: int) -> Callable[[], None]:
            return lambda: nothing(backend.apply_jump(three_kinds(backend.source(), step), 1.0, keep))

        def look() -> None:
            found.update({step: backend.active_jump(step) for step in (1, 2, 3)})

        case.train(backend, {2: jump(True, 2), 3: jump(False, 3), 4: look})
        expect(found[1] is None, "no jump at step 1", repr(found[1]))
        expect(isinstance(found[2], Applied), "the jump that was kept at step 2", repr(found[2]))
        expect(found[3] is None, "None at step 3, whose undoing was not kept", repr(found[3]))


@check
def accuracies_are_shares(case: BackendCase) -> None:
    """`evaluate` is None or in [0, 1], the same when asked again, and the first of `accuracies`."""
    with case.prepared("accuracies") as (backend, _):

        def look() -> None:
            splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
            for split in splits:
                found, again = backend.evaluate(split), backend.evaluate(split)
                expect(found == again, f"the same accuracy on '{split}' when asked again", f"{found}, {again}")
                each = backend.accuracies(split)
                expect(set(each) <= {"sampled", "greedy"}, "accuracies 'sampled' and 'greedy'", sorted(each))
                values = [value for value in (found, *each.values()) if value is not None]
                expect(all(0 <= value <= 1 for value in values), f"accuracies on '{split}' in [0, 1]", values)
                first = next(iter(each.values()), None)
                expect(first == found, f"evaluate gives the first of accuracies({split!r}): {first}", found)

        case.train(backend, {2: look})


@check
def resumes_where_it_was_saved(case: BackendCase) -> None:
    """`prepare(resume=True)` goes on from the last saved step; with `exact_resume`, to the very same end."""
    every = case.run.save_every
    if every is None or every >= case.run.steps:
        raise DoesNotApply("the run saves nothing to resume from: set save_every below steps")
    ended = every + 1
    name = "resumed"

    class Ended(Exception):  # noqa: N818 - somebody ends the process, as it were
        pass

    def end() -> None:
        raise Ended

    with contextlib.suppress(Ended), case.prepared(name) as (backend, _):
        case.train(backend, {ended: end})
    with case.prepared(name, resume=True) as (backend, step):
        expect(step == every, f"a run that ended after step {ended} goes on from step {every}", step)
        reported = case.train(backend, {}, begin=step)
        if case.plugin.in_process:
            expect(reported == list(range(step + 1, case.run.steps + 1)), "the steps after it, in order", reported)
        source = backend.source()
        expect(source.steps[-1] == case.run.steps, f"checkpoints up to step {case.run.steps}", source.steps)
        found = stands(source, case.run.steps)
    if case.plugin.exact_resume:
        different = first_difference(case.plain.end, found)
        wanted = "a resumed run ends bit for bit where the other does (exact_resume)"
        expect(different is None, wanted, f"'{different}' ends elsewhere")

"""Checks of checkpoint sources: what ``CheckpointSource`` says in words, asked of the run that the caller opened."""

from __future__ import annotations

import itertools
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from next_core.checkpoints import open_checkpoints
from next_core.errors import CheckpointError, NextCoreError
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import LowRank, dense
from next_core.testing.check_runner import CheckError, DoesNotApply, expect, raises, register, run_checks
from next_core.testing.plugin_checks import register_common
from next_core.types import LoraFactors

KIND: Final = "source"
TOLERANCE = 1e-3
"""Relative error that the rounding of what is stored may come to."""


class SourceCase:
    """A source of a run of two checkpoints or more, without jumps; where it reads a folder, copies are damaged."""

    def __init__(self, source: CheckpointSource | str | Path) -> None:
        self.plugin = open_checkpoints(source) if isinstance(source, str | Path) else source
        self.source = self.plugin
        expect(len(self.source.steps) > 1, "a run of at least two checkpoints", f"steps {self.source.steps}")

    @contextmanager
    def copied(self) -> Iterator[tuple[Path, Callable[[], CheckpointSource]]]:
        """A copy of the folder, and a way to open it anew. Raises ``DoesNotApply`` for a source that has none."""
        path, listed = (getattr(self.source.config, field, None) for field in ("path", "folders"))
        if path is None or listed:
            raise DoesNotApply("the source does not read one folder (a setting `path`)")
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch).resolve() / "run" / Path(path).name
            shutil.copytree(path, copy, symlinks=True)
            config = self.source.config.model_copy(update={"path": copy})
            yield copy, lambda: type(self.source)(config)

    def names(self) -> list[str]:
        return [parameter.name for parameter in self.source.parameters]


register_common(KIND, SourceCase)
check = register(KIND, SourceCase)


def check_source(source: CheckpointSource | str | Path, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of a source: one that was opened on a run, or the folder of a run whose layout is detected.

    The run has two checkpoints or more, and no jumps. Checks of damage, of detection and of fingerprints need a
    source with the setting ``path``; they work on copies. ``expected_failures`` and errors: see ``check_predictor``.
    """
    case = SourceCase(source)
    run_checks(KIND, source, case, expected_failures, f"source '{case.source.name}'")


@check
def steps_ascend(case: SourceCase) -> None:
    """`steps` are whole numbers, ascending, none twice."""
    steps = case.source.steps
    whole = isinstance(steps, tuple) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in steps)
    expect(whole, "a tuple of whole numbers, 0 or more", repr(steps))
    expect(all(a < b for a, b in itertools.pairwise(steps)), "each step after the one before", repr(steps))


@check
def parameters_are_matrices_of_the_run(case: SourceCase) -> None:
    """`parameters` have names of their own, shapes (m, n), and a rank of 1 or more where the run is LoRA."""
    names = case.names()
    expect(bool(names), "at least one parameter", "none")
    expect(len(set(names)) == len(names), "each name once", names)
    for parameter in case.source.parameters:
        good = len(parameter.shape) == 2 and all(isinstance(size, int) and size > 0 for size in parameter.shape)
        expect(good, f"'{parameter.name}' is (m, n)", repr(parameter.shape))
        good = parameter.rank is None or parameter.rank >= 1
        expect(good, f"the LoRA rank of '{parameter.name}', or None", repr(parameter.rank))


@check
def parameters_are_the_same_in_every_checkpoint(case: SourceCase) -> None:
    """Each parameter can be read at each step, in the shape that it is said to have, low-rank where it is LoRA."""
    for parameter in case.source.parameters:
        for step in case.source.steps:
            delta = case.source.delta(parameter.name, step)
            kind = LowRank if parameter.rank is not None else Tensor
            wanted = f"a {kind.__name__} as delta of '{parameter.name}', whose kind is {parameter.kind}"
            expect(isinstance(delta, kind), wanted, type(delta).__name__)
            shape = tuple(delta.shape)
            expect(shape == parameter.shape, f"shape {parameter.shape} of '{parameter.name}' at step {step}", shape)


@check
def skipped_parameters_have_reasons(case: SourceCase) -> None:
    """What is stored but cannot be extrapolated is named in `skipped` with a reason, and is no parameter."""
    for name, reason in case.source.skipped.items():
        expect(isinstance(reason, str) and bool(reason.strip()), f"a reason why '{name}' is skipped", repr(reason))
        expect(name not in case.names(), "skipped names are no parameters", f"'{name}' is both")


@check
def says_how_folders_are_named_and_what_to_know(case: SourceCase) -> None:
    """`naming` is text and `notes` are texts."""
    expect(isinstance(case.source.naming, str), "`naming` is text", repr(case.source.naming))
    notes = case.source.notes
    expect(not isinstance(notes, str) and all(isinstance(n, str) for n in notes), "`notes` are texts", repr(notes))


@check
def deltas_are_finite(case: SourceCase) -> None:
    """Deltas have finite values only."""
    for name, step in itertools.product(case.names(), case.source.steps):
        good = bool(torch.isfinite(dense(case.source.delta(name, step))).all())
        expect(good, f"a finite delta of '{name}' at step {step}", "NaN or infinity")


@check
def deltas_add_up(case: SourceCase) -> None:
    """W_b - W_0 = (W_b - W_a) + (W_a - W_0) for any two steps; W_a - W_b is the negative, and W_a - W_a zero."""
    for name in case.names():
        for a, b in itertools.combinations(case.source.steps, 2):
            whole, first = (dense(case.source.delta(name, step)) for step in (b, a))
            then, back = dense(case.source.delta(name, b, a)), dense(case.source.delta(name, a, b))
            size = whole.norm() + first.norm()
            _expect_close(then + first, whole, size, f"the delta of '{name}' to {b} is that to {a} and from {a} to {b}")
            _expect_close(back, -then, size, f"the delta of '{name}' from {b} to {a} is the negative of that back")
            _expect_close(dense(case.source.delta(name, a, a)), 0 * whole, size, f"'{name}' from {a} to {a} is zero")


@check
def some_matrix_moves(case: SourceCase) -> None:
    """Checkpoints differ: of a run that did not train nothing can be checked."""
    first, last = case.source.steps[0], case.source.steps[-1]
    moves = any(bool(dense(case.source.delta(name, last, first)).any()) for name in case.names())
    expect(moves, f"some matrix moves from step {first} to step {last}", "none does")


@check
def rows_agree_with_the_whole(case: SourceCase) -> None:
    """`delta_rows` gives the rows of `delta`."""
    a, b = case.source.steps[0], case.source.steps[-1]
    for parameter in case.source.parameters:
        m = parameter.shape[0]
        for since in (None, a):
            whole = dense(case.source.delta(parameter.name, b, since))
            for rows in (slice(0, m), slice(0, 1), slice(m // 2, m), slice(m - 1, m)):
                found = case.source.delta_rows(parameter.name, rows, b, since)
                wanted = f"rows {rows.start} to {rows.stop} of '{parameter.name}' from {since} to {b}"
                expect(found.shape == whole[rows].shape, f"{wanted}: {tuple(whole[rows].shape)}", tuple(found.shape))
                _expect_close(found, whole[rows], whole.norm(), wanted)


@check
def factors_give_the_delta(case: SourceCase) -> None:
    """`factors` of a LoRA run are A (r, n), B (m, r) and a scaling whose differences are `delta`; else None."""
    source, (a, *_, b) = case.source, case.source.steps
    for parameter in source.parameters:
        name = parameter.name
        now, then, start = source.factors(name, b), source.factors(name, a), source.start(name)
        if parameter.rank is None:
            expect(now is None and start is None, f"no factors of '{name}', which is dense", "some")
            continue
        if now is None or then is None:
            raise CheckError(f"factors of '{name}', which is LoRA", "None")
        (m, n), r = parameter.shape, parameter.rank
        shapes = tuple(now.A.shape), tuple(now.B.shape)
        expect(shapes == ((r, n), (m, r)), f"A ({r}, {n}) and B ({m}, {r}) of '{name}'", shapes)
        size = _product(now).norm() + _product(then).norm()
        between, whole = _product(now) - _product(then), _product(now) - (0.0 if start is None else _product(start))
        _expect_close(dense(source.delta(name, b, a)), between, size, f"the delta of '{name}' from its factors")
        wanted = f"the delta of '{name}' since RL began is scaling * B A less `start`"
        _expect_close(dense(source.delta(name, b)), whole, size, wanted)


@check
def position_moves_as_the_deltas_do(case: SourceCase) -> None:
    """`position` is (m, n), and moves between two steps by their delta (in a run without jumps)."""
    source, (a, *_, b) = case.source, case.source.steps
    for name in case.names():
        later, earlier = dense(source.position(name, b)), dense(source.position(name, a))
        delta = dense(source.delta(name, b, a))
        expect(later.shape == delta.shape, f"position of '{name}' is {tuple(delta.shape)}", tuple(later.shape))
        size = later.norm() + earlier.norm()
        _expect_close(later.double() - earlier.double(), delta, size, f"'{name}' moves from {a} to {b} by its delta")


@check
def what_is_not_there_is_refused_by_name(case: SourceCase) -> None:
    """A step that was not observed and a parameter that is none are `CheckpointError`s that name them."""
    name, step = case.names()[0], case.source.steps[-1]
    unknown = step + 1_000_003
    error = raises(CheckpointError, lambda: case.source.delta(name, unknown), f"delta at step {unknown}")
    expect(str(unknown) in str(error), f"an error that names step {unknown}", error)
    nobody = "model.no_such_matrix.weight"
    error = raises(NextCoreError, lambda: case.source.delta(nobody, step), f"delta of '{nobody}'")
    expect("no_such_matrix" in str(error), f"an error that names '{nobody}'", error)


@check
def precision_is_a_floating_point_type(case: SourceCase) -> None:
    """`precision` is the torch dtype that a parameter is stored in."""
    for name in case.names():
        found = case.source.precision(name)
        good = isinstance(found, torch.dtype) and found.is_floating_point
        expect(good, f"a floating-point torch.dtype as precision of '{name}'", repr(found))


@check
def metrics_are_numbers_within_their_span(case: SourceCase) -> None:
    """`metrics` are numbers by name; none were logged after a step and up to the same step."""
    for step in case.source.steps:
        for name, value in case.source.metrics(step).items():
            good = isinstance(name, str) and isinstance(value, int | float)
            expect(good, f"numbers by name as metrics of step {step}", repr((name, value)))
        none = dict(case.source.metrics(step, step))
        expect(not none, f"no metric logged after step {step} and up to it", none)


@check
def reads_the_same_again(case: SourceCase) -> None:
    """Reading the same delta again, after others, gives the same bits."""
    pairs = list(itertools.product(case.names(), case.source.steps))
    first = {pair: dense(case.source.delta(*pair)).clone() for pair in pairs}
    for name, step in reversed(pairs):
        same = torch.equal(dense(case.source.delta(name, step)), first[name, step])
        expect(same, f"the delta of '{name}' at step {step} as it was read before", "other values")


@check
def pickles(case: SourceCase) -> None:
    """A source goes to another process and reads the same there: matrices are compressed in several."""
    sent = pickle.loads(pickle.dumps(case.source))
    expect(sent.steps == case.source.steps, f"steps {case.source.steps} after a round trip", sent.steps)
    for name in case.names():
        same = torch.equal(*(dense(one.delta(name, one.steps[-1])) for one in (case.source, sent)))
        expect(same, f"the same delta of '{name}' after a round trip through pickle", "other values")


def _product(at: LoraFactors) -> Tensor:
    return at.scaling * (at.B.double() @ at.A.double())


def _expect_close(found: Tensor, wanted: Tensor, size: Tensor, what: str) -> None:
    error = float((found.double() - wanted.double()).norm())
    expect(error <= TOLERANCE * float(size), what, f"off by {error:.3g}, where the deltas are {float(size):.3g} long")

"""Checks of checkpoint sources: the promises of ``CheckpointSource``, tested on a run and on copies of its folder."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core.checkpoints import open_checkpoints
from next_core.errors import CheckpointError, NextCoreError, describe
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import LowRank, dense
from next_core.testing.check_runner import CheckError, DoesNotApply, expect, expect_raises, expect_text
from next_core.testing.plugin_checks import check_set
from next_core.types import LoraFactors

TOLERANCE = 1e-3
"""Relative error allowed for the rounding of stored values."""
Deltas = dict[tuple[str, int], Tensor]
Reopen = Callable[[], CheckpointSource]


class SourceCase:
    """A source of a run with two checkpoints or more and without jumps; damage is done to copies of its folder."""

    def __init__(self, source: CheckpointSource | str | Path) -> None:
        self.plugin = open_checkpoints(source) if isinstance(source, str | Path) else source
        self.source = self.plugin
        expect(len(self.source.steps) > 1, "a run of at least two checkpoints", f"steps {self.source.steps}")

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.source.parameters]

    @contextlib.contextmanager
    def copied(self) -> Iterator[tuple[Path, Reopen]]:
        """Yield a copy of the folder and a function that opens it. Raises ``DoesNotApply`` without a folder."""
        path, listed = (getattr(self.source.config, field, None) for field in ("path", "folders"))
        if path is None or listed:
            raise DoesNotApply("the source does not read one folder (a setting `path`)")
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch).resolve() / "run" / Path(path).name
            shutil.copytree(path, copy, symlinks=True)
            config = self.source.config.model_copy(update={"path": copy})
            yield copy, lambda: type(self.source)(config)

    def read(self, source: CheckpointSource) -> Deltas:
        """Return the delta of every parameter at every step since RL began."""
        return {(name, step): dense(source.delta(name, step)).clone() for name in self.names for step in source.steps}


CHECKS = check_set("source", CheckpointSource, SourceCase)
check = CHECKS.add


def check_source(source: CheckpointSource | str | Path, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of a source: an open one, or the folder of a run, whose layout is detected.

    The run needs two checkpoints or more, and no jumps. The checks of damage, detection and fingerprints need a
    source with a setting ``path``; they work on copies. ``expected_failures`` and errors: see ``check_predictor``.
    """
    case = SourceCase(source)
    CHECKS.run(f"source '{case.source.name}'", case, expected_failures)


@check
def steps_ascend(case: SourceCase) -> None:
    """`steps` are integers, 0 or more, in ascending order, without duplicates."""
    steps = case.source.steps
    whole = isinstance(steps, tuple) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in steps)
    expect(whole, "a tuple of integers, 0 or more", repr(steps))
    expect(all(a < b for a, b in itertools.pairwise(steps)), "steps in ascending order", repr(steps))


@check
def parameters_can_be_read_at_every_step(case: SourceCase) -> None:
    """`parameters` have unique names, shapes (m, n) and ranks; each can be read at each step, low-rank under LoRA."""
    expect(bool(case.names), "at least one parameter", "none")
    expect(len(set(case.names)) == len(case.names), "unique parameter names", case.names)
    for parameter in case.source.parameters:
        good = len(parameter.shape) == 2 and all(isinstance(size, int) and size > 0 for size in parameter.shape)
        expect(good, f"a shape (m, n) of '{parameter.name}'", repr(parameter.shape))
        good = parameter.rank is None or parameter.rank >= 1
        expect(good, f"a LoRA rank of '{parameter.name}', or None", repr(parameter.rank))
        kind = LowRank if parameter.rank is not None else Tensor
        for step in case.source.steps:
            delta = case.source.delta(parameter.name, step)
            where = f"of '{parameter.name}' ({parameter.kind}) at step {step}"
            expect(isinstance(delta, kind), f"a {kind.__name__} as delta {where}", type(delta).__name__)
            expect(tuple(delta.shape) == parameter.shape, f"shape {parameter.shape} {where}", tuple(delta.shape))


@check
def deltas_add_up(case: SourceCase) -> None:
    """Deltas are finite, some are not zero, and W_b - W_0 = (W_b - W_a) + (W_a - W_0) for any two steps."""
    first, last = case.source.steps[0], case.source.steps[-1]
    moves = any(bool(dense(case.source.delta(name, last, first)).any()) for name in case.names)
    expect(moves, f"a matrix that moves between steps {first} and {last}; the checks need one", "none moves")
    for name in case.names:
        for a, b in itertools.combinations(case.source.steps, 2):
            whole, before = (dense(case.source.delta(name, step)) for step in (b, a))
            then, back = dense(case.source.delta(name, b, a)), dense(case.source.delta(name, a, b))
            finite = all(bool(torch.isfinite(delta).all()) for delta in (whole, before, then, back))
            expect(finite, f"finite deltas of '{name}' at steps {a} and {b}", "NaN or infinity")
            size = whole.norm() + before.norm()
            _expect_close(then + before, whole, size, f"'{name}': delta({b}) = delta({b}, {a}) + delta({a})")
            _expect_close(back, -then, size, f"'{name}': delta({a}, {b}) = -delta({b}, {a})")
            _expect_close(dense(case.source.delta(name, a, a)), 0 * whole, size, f"'{name}': delta({a}, {a}) = 0")


@check
def rows_agree_with_the_whole(case: SourceCase) -> None:
    """`delta_rows` returns the rows of `delta`."""
    a, b = case.source.steps[0], case.source.steps[-1]
    for parameter in case.source.parameters:
        m = parameter.shape[0]
        for since in (None, a):
            whole = dense(case.source.delta(parameter.name, b, since))
            for rows in (slice(0, m), slice(0, 1), slice(m // 2, m), slice(m - 1, m)):
                found = case.source.delta_rows(parameter.name, rows, b, since)
                wanted = f"rows {rows.start} to {rows.stop} of the delta of '{parameter.name}' from {since} to {b}"
                expect(found.shape == whole[rows].shape, f"{wanted}: {tuple(whole[rows].shape)}", tuple(found.shape))
                _expect_close(found, whole[rows], whole.norm(), wanted)


@check
def factors_give_the_delta(case: SourceCase) -> None:
    """`factors` of a LoRA run are A (r, n), B (m, r) and a scaling whose differences are `delta`; otherwise None."""
    source, (a, *_, b) = case.source, case.source.steps
    for parameter in source.parameters:
        name = parameter.name
        now, then, start = source.factors(name, b), source.factors(name, a), source.start(name)
        if parameter.rank is None:
            expect(now is None and start is None, f"no factors of '{name}', which is dense", "factors")
            continue
        if now is None or then is None:
            raise CheckError(f"factors of '{name}', which is LoRA", "None")
        (m, n), r = parameter.shape, parameter.rank
        shapes = tuple(now.A.shape), tuple(now.B.shape)
        expect(shapes == ((r, n), (m, r)), f"A ({r}, {n}) and B ({m}, {r}) of '{name}'", shapes)
        size = _product(now).norm() + _product(then).norm()
        between, whole = _product(now) - _product(then), _product(now) - (0.0 if start is None else _product(start))
        _expect_close(dense(source.delta(name, b, a)), between, size, f"delta({b}, {a}) of '{name}' from its factors")
        _expect_close(dense(source.delta(name, b)), whole, size, f"delta({b}) of '{name}': scaling * B A less `start`")


@check
def position_moves_with_the_deltas(case: SourceCase) -> None:
    """`position` is (m, n), and moves between two steps by their delta (in a run without jumps)."""
    source, (a, *_, b) = case.source, case.source.steps
    for name in case.names:
        later, earlier = dense(source.position(name, b)), dense(source.position(name, a))
        delta = dense(source.delta(name, b, a))
        expect(later.shape == delta.shape, f"position of '{name}' is {tuple(delta.shape)}", tuple(later.shape))
        wanted = f"position of '{name}' moves from step {a} to step {b} by its delta"
        _expect_close(later.double() - earlier.double(), delta, later.norm() + earlier.norm(), wanted)


@check
def refuses_unknown_steps_and_parameters(case: SourceCase) -> None:
    """A step that was not observed is a `CheckpointError`, an unknown parameter an error; both name what is wrong."""
    name, step = case.names[0], case.source.steps[-1]
    unknown = step + 1_000_003
    error = expect_raises(CheckpointError, lambda: case.source.delta(name, unknown), f"delta at step {unknown}")
    expect(str(unknown) in str(error), f"an error that names step {unknown}", error)
    error = expect_raises(NextCoreError, lambda: case.source.delta("no.such_matrix", step), "delta of 'no.such_matrix'")
    expect("no.such_matrix" in str(error), "an error that names 'no.such_matrix'", error)


@check
def describes_its_parameters_and_metrics(case: SourceCase) -> None:
    """`skipped` and `notes` hold reasons as text, `precision` is a float dtype, and `metrics` are numbers by name."""
    for name, reason in case.source.skipped.items():
        expect_text(reason, f"a reason why '{name}' is skipped")
        expect(name not in case.names, "skipped names are not parameters", f"'{name}' is both")
    notes = case.source.notes
    expect(not isinstance(notes, str) and all(isinstance(n, str) for n in notes), "a list of texts", repr(notes))
    for name in case.names:
        found = case.source.precision(name)
        good = isinstance(found, torch.dtype) and found.is_floating_point
        expect(good, f"a floating-point torch.dtype as precision of '{name}'", repr(found))
    for step in case.source.steps:
        logged, none = dict(case.source.metrics(step)), dict(case.source.metrics(step, step))
        good = all(isinstance(k, str) and isinstance(v, int | float) for k, v in logged.items())
        expect(good, f"numbers by name as metrics of step {step}", logged)
        expect(not none, f"no metrics after step {step} and up to it", none)


@check
def reads_the_same_again(case: SourceCase) -> None:
    """Reading a delta again, and reading it in another process (after pickling), gives the same bits."""
    first = case.read(case.source)
    sent: CheckpointSource = pickle.loads(pickle.dumps(case.source))
    expect(sent.steps == case.source.steps, f"steps {case.source.steps} after pickling", sent.steps)
    for (name, step), value in reversed(first.items()):
        for source, when in ((case.source, "when it is read again"), (sent, "after pickling")):
            same = torch.equal(dense(source.delta(name, step)), value)
            expect(same, f"the same delta of '{name}' at step {step} {when}", "other values")


@check
def reads_only_its_own_layout_anywhere(case: SourceCase) -> None:
    """`detect` accepts the folder and no other, and a copy has the same steps, deltas and fingerprints."""
    with case.copied() as (folder, reopen), tempfile.TemporaryDirectory() as other:
        cls, copy = type(case.source), reopen()
        expect(bool(cls.detect(folder)), f"detect accepts {folder.name}, which it reads", "it does not")
        expect(not cls.detect(Path(other)), "detect rejects an empty folder", "it accepts it")
        (Path(other) / "notes-10").mkdir()
        (Path(other) / "notes-10" / "notes.txt").write_text("nothing here")
        expect(not cls.detect(Path(other)), "detect rejects a folder of text files", "it accepts it")
        expect(copy.steps == case.source.steps, f"steps {case.source.steps} of a copy", copy.steps)
        expect(_same(case.read(copy), case.read(case.source)), "the same deltas from a copy", "other deltas")
        prints, copied = ([source.fingerprint(s) for s in source.steps] for source in (case.source, copy))
        expect(copied == prints, "the same fingerprints from a copy", "other fingerprints")


@check
def names_damaged_files(case: SourceCase) -> None:
    """A file that is truncated, missing, overwritten or has NaN is a `CheckpointError` that names it.

    Files on which no delta depends may be damaged. NaN is written to files in the safetensors format only.
    """
    before = case.read(case.source)
    damages: dict[str, Callable[[Path], object]] = {
        "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "missing": Path.unlink,
        "overwritten": lambda file: file.write_bytes(b"\x00not what you expect\xff" * 8),
        "with NaN": lambda file: _multiply(file, torch.nan),
    }
    with case.copied() as (folder, reopen):
        for file, (how, damage) in itertools.product(_files(folder), damages.items()):
            kept, place = file.read_bytes(), file.relative_to(folder)
            damage(file)
            wanted = f"a CheckpointError that names {place} ({how}) or its folder"
            try:
                after = case.read(reopen())
            except CheckpointError as error:
                expect(any(part in str(error) for part in place.parts), wanted, f"CheckpointError: {error}")
            except Exception as error:
                raise CheckError(wanted, describe(error)) from error
            else:
                expect(_same(after, before), f"{wanted}, or the same deltas as before", "other deltas, or fewer steps")
            file.write_bytes(kept)


@check
def fingerprints_follow_the_weights(case: SourceCase) -> None:
    """`fingerprint` is the same when asked again, and differs where weights differ: results are cached by it."""
    source, before = case.source, case.read(case.source)
    prints = {step: source.fingerprint(step) for step in (None, *source.steps)}
    if any(found is None for found in prints.values()):
        raise DoesNotApply("the source has no fingerprints, so nothing computed from it is cached")
    again = {step: source.fingerprint(step) for step in prints}
    expect(all(isinstance(found, str) for found in again.values()) and again == prints, f"text, again {prints}", again)
    for a, b in itertools.pairwise(source.steps):
        moved = any(not torch.equal(before[name, a], before[name, b]) for name in case.names)
        expect(not moved or prints[a] != prints[b], f"different fingerprints at steps {a} and {b}", prints[a])
    with case.copied() as (folder, reopen):
        for file in _files(folder):
            kept = file.read_bytes()
            _multiply(file, 1.25)
            with contextlib.suppress(CheckpointError):  # the change was noticed
                changed = reopen()
                moved_steps = {
                    key[1] for key, value in case.read(changed).items() if not torch.equal(value, before[key])
                }
                # Where RL began affects every delta and has a fingerprint of its own.
                same = {step for step in moved_steps if changed.fingerprint(step) == prints[step]}
                good = not same or changed.fingerprint(None) != prints[None]
                expect(good, f"other fingerprints once {file.name} changes", f"the same at steps {sorted(same)}")
            file.write_bytes(kept)


def _multiply(file: Path, factor: float) -> None:
    """Multiply every number in a safetensors file; flip one bit of the last byte of another file."""
    kept = file.read_bytes()
    try:
        tensors = load_file(file)
    except SafetensorError:
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if kept else kept)
        return
    changed = {key: value * factor if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(changed, file, metadata={"format": "pt"})


def _files(folder: Path) -> list[Path]:
    """Return the files of the first and the last folder by name: the other checkpoints are like them."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = sorted({file.parts[0] for file in files})
    return [folder / file for file in files if file.parts[0] in (entries[0], entries[-1])]


def _same(one: Deltas, other: Deltas) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[key]) for key, value in one.items())


def _product(at: LoraFactors) -> Tensor:
    return at.scaling * (at.B.double() @ at.A.double())


def _expect_close(found: Tensor, wanted: Tensor, size: Tensor, what: str) -> None:
    error = float((found.double() - wanted.double()).norm())
    expect(error <= TOLERANCE * float(size), what, f"the difference has norm {error:.3g}; the deltas {float(size):.3g}")

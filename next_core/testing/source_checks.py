"""Checks of checkpoint sources: the promises of ``CheckpointSource``, tested on a run and on copies of its folder."""

import contextlib
import itertools
import pickle
import shutil
import tempfile
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core.errors import CheckpointError, NextCoreError, describe
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import LowRank, dense
from next_core.testing.check_runner import CheckError, checks_for, expect, expect_equal, expect_raises, run_checks
from next_core.types import LoraFactors

TOLERANCE = 1e-3  # Relative error allowed for the rounding of stored values
Deltas = dict[tuple[str, int], Tensor]


class SourceCase:
    """A source of a run with two checkpoints or more and without jumps; damage is done to copies of its folder."""

    def __init__(self, source: CheckpointSource) -> None:
        self.plugin = self.source = source
        expect(len(source.steps) > 1, "a run of at least two checkpoints", f"steps {source.steps}")
        self.names = [parameter.name for parameter in source.parameters]

    @contextlib.contextmanager
    def copied(self) -> Iterator[tuple[Path, Callable[[], CheckpointSource]]]:
        """Yield a copy of the folder and a function that opens it. Raises ``SkipTest`` without a folder."""
        path = getattr(self.source.config, "path", None)
        if path is None or getattr(self.source.config, "folders", None):
            raise unittest.SkipTest("the source does not read one folder (a setting `path`)")
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch).resolve() / "run" / Path(path).name
            shutil.copytree(path, copy, symlinks=True)
            yield copy, lambda: type(self.source)(self.source.config.model_copy(update={"path": copy}))

    def read(self, source: CheckpointSource) -> Deltas:
        """Return the delta of every parameter at every step since RL began."""
        return {(name, step): dense(source.delta(name, step)).clone() for name in self.names for step in source.steps}

    def fingerprints(self, source: CheckpointSource) -> dict[int | None, str | None]:
        """Return the fingerprint of every step and of where RL began (None)."""
        return {step: source.fingerprint(step) for step in (None, *source.steps)}


check = checks_for("source", SourceCase)


def check_source(source: CheckpointSource) -> None:
    """Run every check of a source that is open on a run with two checkpoints or more, and no jumps.

    The checks of damage, detection and fingerprints need a setting ``path``; they work on copies of that folder.
    Raises an ``ExceptionGroup`` of all failures.
    """
    run_checks("source", source.name, source)


@check
def lists_steps_and_parameters(case: SourceCase) -> None:
    """`steps` ascend; `parameters` have unique names and the shape of their deltas, which are low-rank under LoRA."""
    steps = case.source.steps
    ascending = all(isinstance(step, int) for step in steps) and all(a < b for a, b in itertools.pairwise((-1, *steps)))
    expect(isinstance(steps, tuple) and ascending, "a tuple of integers, 0 or more, ascending", repr(steps))
    expect(0 < len(set(case.names)) == len(case.names), "parameters with unique names", case.names)
    for parameter, step in itertools.product(case.source.parameters, steps):
        delta = case.source.delta(parameter.name, step)
        found, wanted = isinstance(delta, LowRank), parameter.rank is not None
        where = f"of '{parameter.name}' at step {step}"
        expect(found == wanted, f"a {'low-rank' if wanted else 'dense'} delta {where}", type(delta).__name__)
        expect(tuple(delta.shape) == parameter.shape, f"shape {parameter.shape} {where}", tuple(delta.shape))


@check
def deltas_add_up(case: SourceCase) -> None:
    """Deltas are finite, some are not zero, and W_b - W_0 = (W_b - W_a) + (W_a - W_0); `position` moves by them.

    `delta_rows` returns their rows.
    """
    source, first, last = case.source, case.source.steps[0], case.source.steps[-1]
    moves = any(dense(source.delta(name, last, first)).any() for name in case.names)
    expect(moves, f"a matrix that moves between steps {first} and {last}; the checks need one", "none moves")
    for name, (a, b) in itertools.product(case.names, itertools.combinations(source.steps, 2)):
        whole, before, then = (dense(source.delta(name, *span)) for span in ((b,), (a,), (b, a)))
        expect(bool(torch.isfinite(whole + then).all()), f"finite deltas of '{name}' at {a} and {b}", "NaN or Inf")
        _expect_close(then + before, whole, before, f"'{name}': delta({b}) = delta({b}, {a}) + delta({a})")
        later, earlier = dense(source.position(name, b)).double(), dense(source.position(name, a)).double()
        _expect_close(later - earlier, then, later, f"position of '{name}' moves from step {a} to {b} by its delta")
        for since, rows in itertools.product((None, a), (slice(0, 1), slice(1, len(whole)))):
            wanted, found = dense(source.delta(name, b, since))[rows], source.delta_rows(name, rows, b, since)
            expect(found.shape == wanted.shape, f"rows {rows} of '{name}': {tuple(wanted.shape)}", tuple(found.shape))
            _expect_close(found, wanted, whole, f"delta_rows of '{name}', {rows}, from {since} to {b}")


@check
def factors_give_the_delta(case: SourceCase) -> None:
    """`factors` of a LoRA run are A (r, n), B (m, r) and a scaling whose differences are `delta`; otherwise None."""
    source, a, b = case.source, case.source.steps[0], case.source.steps[-1]
    for parameter in source.parameters:
        name = parameter.name
        now, then, start = source.factors(name, b), source.factors(name, a), source.start(name)
        if parameter.rank is None or now is None or then is None:
            expect(now is then is start is None and parameter.rank is None, f"factors of '{name}' under LoRA only", now)
            continue
        expect(now.A.shape[0] == parameter.rank, f"A ({parameter.rank}, n) of '{name}'", tuple(now.A.shape))
        for since, before in ((a, then), (None, start)):
            moved = _product(now) - (0.0 if before is None else _product(before))
            wanted = f"delta({b}, {since}) of '{name}' from its factors: scaling * B A less the earlier one"
            _expect_close(dense(source.delta(name, b, since)), moved, _product(now), wanted)


@check
def refuses_unknown_steps_and_parameters(case: SourceCase) -> None:
    """A step that was not observed is a `CheckpointError`, an unknown parameter an error of next-core."""
    name, step = case.names[0], case.source.steps[-1]
    expect_raises(CheckpointError, lambda: case.source.delta(name, step + 1_000_003), "delta at an unknown step")
    expect_raises(NextCoreError, lambda: case.source.delta("no.such_matrix", step), "delta of 'no.such_matrix'")


@check
def reads_the_same_again(case: SourceCase) -> None:
    """Reading a delta again, also after pickling, gives the same bits; steps that differ have other fingerprints."""
    first, sent = case.read(case.source), pickle.loads(pickle.dumps(case.source))
    expect_equal(first, case.read(case.source), "the same deltas when they are read again")
    expect_equal(first, case.read(sent), "the same steps and deltas after pickling")
    prints = case.fingerprints(case.source)
    for a, b in itertools.pairwise(case.source.steps):
        same = all(torch.equal(first[name, a], first[name, b]) for name in case.names)
        expect(same or prints[a] is None or prints[a] != prints[b], f"other fingerprints at step {b} than {a}", prints)


@check
def names_damaged_files(case: SourceCase) -> None:
    """A file that is truncated, missing, overwritten or has NaN is a `CheckpointError` that names it.

    Files on which no delta depends may be damaged. Other valid weights, or NaN, are written to files in the safetensors
    format only; other weights need another `fingerprint`, because results are cached by it.
    """
    before, prints = case.read(case.source), case.fingerprints(case.source)
    damages: dict[str, Callable[[Path], object]] = {
        "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "missing": Path.unlink,
        "overwritten": lambda file: file.write_bytes(b"\x00not what you expect\xff" * 8),
        "with NaN": lambda file: _multiply(file, torch.nan),
        "changed": lambda file: _multiply(file, 1.25),
    }
    with case.copied() as (folder, reopen):
        expect_equal(prints, case.fingerprints(reopen()), "a copy has the same fingerprints")
        for file, (how, damage) in itertools.product(_files(folder), damages.items()):
            kept, place = file.read_bytes(), file.relative_to(folder)
            damage(file)
            wanted = f"a CheckpointError that names {place} ({how}) or its folder"
            try:
                source = reopen()
                after, now = case.read(source), case.fingerprints(source)
            except CheckpointError as error:
                expect(any(part in str(error) for part in place.parts), wanted, f"CheckpointError: {error}")
            except Exception as error:
                raise CheckError(wanted, describe(error)) from error
            else:
                if how != "changed":
                    expect_equal(before, after, f"{wanted}, or the same deltas as before")
                elif None not in prints.values() and now[None] == prints[None]:  # else all of it is computed again
                    moved = {step for (name, step), delta in after.items() if (delta != before[name, step]).any()}
                    stale = sorted(step for step in moved if now[step] == prints[step])
                    expect(not stale, f"other fingerprints once {place} changes", f"the same at steps {stale}")
            file.write_bytes(kept)


def _multiply(file: Path, factor: float) -> None:
    """Multiply every number in a safetensors file; leave others as they are."""
    with contextlib.suppress(SafetensorError):
        tensors = load_file(file)
        changed = {key: value * factor if value.is_floating_point() else value for key, value in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})


def _files(folder: Path) -> list[Path]:
    """Return the files of the first and the last folder by name: the other checkpoints are like them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = sorted({file.relative_to(folder).parts[0] for file in files})
    return [file for file in files if file.relative_to(folder).parts[0] in (entries[0], entries[-1])]


def _product(at: LoraFactors) -> Tensor:
    return at.scaling * (at.B.double() @ at.A.double())


def _expect_close(found: Tensor, wanted: Tensor, scale: Tensor, what: str) -> None:
    error, size = float((found.double() - wanted.double()).norm()), float(scale.norm() + wanted.norm())
    expect(error <= TOLERANCE * size, what, f"the difference has norm {error:.3g}; the deltas {size:.3g}")

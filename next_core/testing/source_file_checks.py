"""Checks of sources that read a folder: detection, damage, fingerprints; on copies of the folder."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core.errors import CheckpointError, describe
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import dense
from next_core.testing.check_runner import CheckError, DoesNotApply, expect, register
from next_core.testing.source_checks import SourceCase

check = register("source", SourceCase)
Deltas = dict[tuple[str, int], Tensor]
Reopen = Callable[[], CheckpointSource]


@check
def detects_its_own_layout_only(case: SourceCase) -> None:
    """`detect` claims the folder that was opened, and neither an empty one nor one of something else."""
    with case.copied() as (folder, _), tempfile.TemporaryDirectory() as other:
        cls = type(case.source)
        expect(bool(cls.detect(folder)), f"detect claims {folder.name}, which it reads", "it does not")
        expect(not cls.detect(Path(other)), "detect leaves an empty folder alone", "it claims it")
        (Path(other) / "notes-10").mkdir()
        (Path(other) / "notes-10" / "notes.txt").write_text("nothing here")
        expect(not cls.detect(Path(other)), "detect leaves a folder of texts alone", "it claims it")


@check
def opens_a_copy_to_the_same(case: SourceCase) -> None:
    """The folder read in another place gives the same steps and deltas."""
    with case.copied() as (_, reopen):
        expect(reopen().steps == case.source.steps, f"steps {case.source.steps}", reopen().steps)
        expect(_same(_read(case, reopen()), _read(case, case.source)), "the same deltas from a copy", "others")


@check
def names_what_is_cut_short(case: SourceCase) -> None:
    """A file cut in half is a `CheckpointError` that names it or its folder, unless no delta depends on it."""
    _damage_each_file(case, lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "cut in half")


@check
def names_what_is_missing(case: SourceCase) -> None:
    """A file that is gone is a `CheckpointError` that names it or its folder, unless no delta depends on it."""
    _damage_each_file(case, Path.unlink, "gone")


@check
def names_what_is_no_checkpoint(case: SourceCase) -> None:
    """A file of other bytes is a `CheckpointError` that names it or its folder, unless no delta depends on it."""
    _damage_each_file(case, lambda file: file.write_bytes(b"\x00not what you expect\xff" * 8), "overwritten")


@check
def refuses_values_that_are_not_finite(case: SourceCase) -> None:
    """NaN in the weights is a `CheckpointError` when a delta is read (asked of files in the safetensors format)."""
    with case.copied() as (folder, reopen):
        tensors, file = next(_readable(folder), ({}, None))
        if file is None:
            raise DoesNotApply("no file in the safetensors format")
        for value in tensors.values():
            if value.is_floating_point():
                value.view(-1)[0] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
        try:
            _read(case, reopen())
        except CheckpointError:
            return
        raise CheckError(f"CheckpointError for NaN in {file.name}", "deltas without complaint")


@check
def fingerprints_tell_states_apart(case: SourceCase) -> None:
    """`fingerprint` is the same for the same weights, read again or elsewhere, and another for other weights."""
    source = case.source
    moments = (None, *source.steps)
    prints = {step: _fingerprint(source, step) for step in moments}
    if any(found is None for found in prints.values()):
        raise DoesNotApply("the source does not tell fingerprints: nothing computed from it is cached")
    for step, found in prints.items():
        again = _fingerprint(source, step)
        expect(isinstance(found, str) and again == found, f"one text as fingerprint of {step}", f"{found!r}, {again!r}")
    for a, b in itertools.pairwise(source.steps):
        moved = any(bool(dense(source.delta(name, b, a)).any()) for name in case.names())
        expect(not moved or prints[a] != prints[b], f"other fingerprints at steps {a} and {b}", prints[a])
    with case.copied() as (_, reopen):
        elsewhere = {step: _fingerprint(reopen(), step) for step in moments}
        expect(elsewhere == prints, "the same fingerprints for a copy of the folder", "others")


@check
def fingerprints_change_with_the_weights(case: SourceCase) -> None:
    """A checkpoint whose stored values change gets another fingerprint."""
    if _fingerprint(case.source, case.source.steps[-1]) is None:
        raise DoesNotApply("the source does not tell fingerprints: nothing computed from it is cached")
    before = _read(case, case.source)
    with case.copied() as (folder, reopen):
        for file in _files(folder):
            kept = file.read_bytes()
            if not kept:
                continue
            _change_values(file)
            try:
                changed = reopen()
                after = _read(case, changed)
                other = {step for (name, step), value in after.items() if not torch.equal(value, before[name, step])}
                told = {s for s in other if _fingerprint(changed, s) != _fingerprint(case.source, s)}
            except CheckpointError:
                other = told = set()  # found out
            # Where RL began decides all deltas, and has a fingerprint of its own.
            whole = bool(other) and _fingerprint(case.source, None) != _start_print(reopen)
            expect(
                whole or other == told,
                f"other fingerprints of steps {sorted(other)}, whose deltas change with {file.name}",
                f"the same at steps {sorted(other - told)}",
            )
            file.write_bytes(kept)


def _change_values(file: Path) -> None:
    """All values by a little, where the format is known; else a bit of the last one."""
    try:
        tensors = load_file(file)
    except SafetensorError:
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    else:
        changed = {key: value * 1.25 if value.is_floating_point() else value for key, value in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})


def _start_print(reopen: Reopen) -> str | None:
    try:
        return _fingerprint(reopen(), None)
    except CheckpointError:
        return None


def _fingerprint(source: CheckpointSource, step: int | None) -> str | None:
    return source.fingerprint(step)


def _damage_each_file(case: SourceCase, damage: Callable[[Path], object], how: str) -> None:
    """Damage one file after the other; each is either named, or no delta changes with it."""
    before = _read(case, case.source)
    with case.copied() as (folder, reopen):
        for file in _files(folder):
            kept, place = file.read_bytes(), file.relative_to(folder)
            damage(file)
            wanted = f"CheckpointError that names {place}, {how}, or its folder"
            try:
                after = _read(case, reopen())
            except CheckpointError as error:
                named = any(part in str(error) for part in place.parts)
                expect(named, wanted, f"CheckpointError: {error}")
            except Exception as error:
                raise CheckError(wanted, describe(error)) from error
            else:
                expect(_same(after, before), f"{wanted}, or the same deltas as before", "other deltas, or fewer steps")
            file.write_bytes(kept)


def _files(folder: Path) -> list[Path]:
    """The files of two checkpoints, the first and the last by name: the others are like them."""
    inside = sorted({path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()})
    chosen = {inside[0], inside[-1]} if inside else set()
    return [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.relative_to(folder).parts[0] in chosen
    ]


def _readable(folder: Path) -> Iterator[tuple[dict[str, Tensor], Path]]:
    for path in reversed(_files(folder)):
        if path.suffix == ".safetensors":
            try:
                yield load_file(path), path
            except SafetensorError:
                continue


def _read(case: SourceCase, source: CheckpointSource) -> Deltas:
    return {(name, step): dense(source.delta(name, step)) for name in case.names() for step in source.steps}


def _same(one: Deltas, other: Deltas) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[key]) for key, value in one.items())

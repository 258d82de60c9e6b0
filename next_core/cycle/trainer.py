"""A trainer from its start to its end, and what it throws."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from next_core.backend import Backend
from next_core.errors import BackendError, NextCoreError, StorageError, describe
from next_core.storage.atomic import is_full
from next_core.types import Progress

ERROR_LOG = "error.log"


def start_trainer(backend: Backend, out: Path, progress: Progress | None) -> None:
    with trainer_errors(out):
        if not backend.in_process:
            tell(progress, "the trainer starts", 0, 1)
        backend.start()
        if not backend.in_process:
            tell(progress, "the trainer starts", 1, 1)


@contextlib.contextmanager
def closed_after_an_error(backend: Backend) -> Iterator[None]:
    """End the trainer when the body fails, and let the body's error be the one that is seen."""
    try:
        yield
    except BaseException as error:
        try:
            backend.close()
        except Exception as second:
            error.add_note(f"the trainer could not be ended either: {describe(second)}")
        raise


@contextlib.contextmanager
def trainer_errors(out: Path) -> Iterator[None]:
    """What the trainer, or a reward it calls, throws becomes one message; the traceback is kept in a file."""
    try:
        yield
    except Exception as error:
        full = is_full(error) and not isinstance(error, StorageError)
        if isinstance(error, NextCoreError) and not full:
            raise
        if full:
            raise StorageError(
                f"the disk of {out} was full while the trainer wrote ({describe(error)}); free some space, and run the "
                "same command again: it goes on from the last checkpoint that is whole"
            ) from error
        log = out / ERROR_LOG
        with contextlib.suppress(OSError):  # the trainer's own error is the one to be seen
            log.write_text(traceback.format_exc(), encoding="utf-8")
        raise BackendError(f"the trainer failed: {describe(error)}; the whole traceback is in {log}") from error


def accuracies(backend: Backend) -> dict[str, dict[str, float]]:
    return {split: dict(backend.accuracies(split)) for split in ("validation", "test")}


def tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)

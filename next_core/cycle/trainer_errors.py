"""Start and close a trainer, and convert its errors to ours."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from next_core.backend import Backend
from next_core.errors import NextCoreError, StorageError, describe, trainer_failed
from next_core.storage.atomic import is_full
from next_core.types import Progress

ERROR_LOG = "error.log"


def start_trainer(backend: Backend, out: Path, progress: Progress | None) -> None:
    """Start a trainer. One that runs in its own process takes minutes, so progress is shown."""
    shown = None if backend.in_process else progress
    with trainer_errors(out):
        report_progress(shown, "the trainer starts", 0, 1)
        backend.start()
        report_progress(shown, "the trainer starts", 1, 1)


@contextlib.contextmanager
def closed_after_an_error(backend: Backend) -> Iterator[None]:
    """Close the trainer when the body fails, and re-raise the body's error."""
    try:
        yield
    except BaseException as error:
        try:
            backend.close()
        except Exception as second:
            error.add_note(f"closing the trainer failed too: {describe(second)}")
        raise


@contextlib.contextmanager
def trainer_errors(out: Path) -> Iterator[None]:
    """Turn an error of the trainer, or of a reward it calls, into a ``BackendError``; its traceback goes to a file."""
    try:
        yield
    except Exception as error:
        if is_full(error) and not isinstance(error, StorageError):
            raise StorageError(
                f"the disk of {out} was full while the trainer wrote ({describe(error)}); free some space, and run the "
                "same command again: it resumes from the last complete checkpoint",
                kind="storage-full",
            ) from error
        if isinstance(error, NextCoreError):
            raise
        log = out / ERROR_LOG
        with contextlib.suppress(OSError):  # the trainer's own error matters more
            log.write_text(traceback.format_exc(), encoding="utf-8")
        raise trainer_failed(f"the trainer failed: {describe(error)}; the whole traceback is in {log}") from error


def report_progress(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)

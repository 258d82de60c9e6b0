"""Somebody who opens a run's folder at any moment: whatever is there has to be old or new, and whole."""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from next_core import History, open_checkpoints
from next_core.config import load_config
from next_core.cycle.journal import JOURNAL, read_journal
from next_core.cycle.run import CONFIG, RESULT, read_result
from next_core.report.inputs import open_folder
from next_core.storage.manifest import MANIFEST, check_manifest

TRIES = 5
"""How often a reader looks again at what was replaced while it looked."""


def damages(out: Path) -> list[str]:
    """What in ``out`` is neither old nor new; ``out`` is the folder of a run, or of the callback's trainer."""
    found = [_complaint(path, path, _check_all) for path in _complete(out)]
    for folder in (out, out / "next-core"):
        found += [
            _complaint(folder, folder / CONFIG, lambda folder: load_config(folder / CONFIG)),
            _complaint(folder, folder / JOURNAL, lambda folder: read_journal(folder / JOURNAL)),
            _complaint(folder, folder / JOURNAL, open_folder),
            _complaint(folder, folder / RESULT, read_result),
            _complaint(folder, folder / "checkpoints" / "step-000002", _newest_motion),
        ]
    return [complaint for complaint in found if complaint is not None]


def _complete(out: Path) -> list[Path]:
    """The folders that are whole if they are there at all, or if they have a manifest: those the trainer wrote."""
    ours = [
        path
        for folder in (out, out / "next-core")
        for pattern in ("checkpoints/step-*", "jumps/[0-9]*")
        for path in folder.glob(pattern)
    ]
    return ours + [path.parent for path in out.glob(f"**/checkpoint-*/{MANIFEST}")]


def _check_all(folder: Path) -> None:
    check_manifest(folder, contents=True)


def _newest_motion(folder: Path) -> None:
    """As the command line reads a run; after a rollback its history starts anew, with no checkpoint yet."""
    source = open_checkpoints(folder / "checkpoints")
    if source.steps:
        history = History(source)
        history.inner_products([(history.newest, None)])


def _complaint(folder: Path, there: Path, read: Callable[[Path], Any]) -> str | None:
    """What a reader of ``folder`` has to complain of, where ``there`` is in it."""
    complaint = None
    for _ in range(TRIES):
        before = _identity(folder)
        if before is None or str(there) not in before:
            return None
        try:
            read(folder)
        except Exception as error:  # whatever it is, it is told
            complaint = f"{folder}: {type(error).__name__}: {error}"
            if before == _identity(folder):
                return complaint
        else:
            return None
    return complaint


def _identity(path: Path) -> dict[str, tuple[int, int]] | None:
    """Which files and folders these are, and when one was last added or taken away; None where they are going away.

    What was replaced or removed while it was read is no damage. A file that is written in its place would be one.
    """
    try:
        facts = {there: there.stat() for there in (path, *path.rglob("*"))}
        return {str(there): (f.st_ino, f.st_ctime_ns if stat.S_ISDIR(f.st_mode) else 0) for there, f in facts.items()}
    except FileNotFoundError:
        return None


def read_on(out: Path, stop: Path) -> tuple[int, list[str]]:
    """Look again and again until a file is there: how often, and what was found."""
    looks, found = 0, []
    while not stop.exists():
        with contextlib.suppress(FileNotFoundError):  # what was listed is gone
            found += damages(out)
            looks += out.is_dir()
        time.sleep(0.02)
    return looks, found[:20]

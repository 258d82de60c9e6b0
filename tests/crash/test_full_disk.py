"""A disk that is full, or read-only, at any moment of a run: a message, nothing lost, and on to the end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.conftest import Whole
from tests.crash.reader import damages
from tests.crash.work import Fill, Forbid, Point, Remount

pytestmark = pytest.mark.trl
MEGABYTES = 24
BEFORE_ANYTHING = Point("before locking", "run", 1)
FULL = {
    "before anything": BEFORE_ANYTHING,
    "at its config": Point("before writing", "run/config.yaml", 1),
    "at the first checkpoint": Point("before making a folder", "run/checkpoints/step-000000", 1),
    "in the trainer's own checkpoint": Point("after appending to", "run/metrics.jsonl", 6),
    "at the manifest of the trainer's checkpoint": Point("before writing", "run/trainer/checkpoint-9/manifest.json", 1),
    "at a jump": Point("before making a folder", "run/jumps/0001", 1),
    "in a jump": Point("after making a folder", "run/jumps/0002", 1),
    "at a rollback": Point("before writing", "run/jumps/0002/undone.json", 1),
    "at a later checkpoint": Point("after making a folder", "run/checkpoints/step-000010", 1),
    "at the journal": Point("before appending to", "run/journal.jsonl", 12),
    "at the result": Point("before writing", "run/result.json", 1),
}
SOONEST = ("before anything", "in the trainer's own checkpoint", "in a jump", "at the result")
HEAVY = [moment for moment in FULL if moment not in SOONEST]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("moment", [*SOONEST, *(pytest.param(moment, marks=pytest.mark.crash) for moment in HEAVY)])
def test_a_run_whose_disk_is_full_says_so_and_goes_on_when_there_is_space(
    moment: str, whole_run: Whole, disk: Path
) -> None:
    ballast, out = disk / "ballast", disk / "runs" / "run"
    stopped = whole_run.go(out, FULL[moment], Fill(ballast))
    assert stopped.code == 7, stopped
    assert stopped.error.startswith("StorageError: ")
    assert str(out) in stopped.error
    assert "free some space" in stopped.error
    assert damages(out) == []
    ballast.unlink()
    again = whole_run.go(out)
    assert again.code == 0, again.error
    whole_run.check(out)


def test_a_disk_that_is_read_only_is_named_before_anything_is_done(whole_run: Whole, disk: Path) -> None:
    out = disk / "runs" / "run"
    stopped = whole_run.go(out, BEFORE_ANYTHING, Remount(disk))
    assert stopped.code == 7, stopped
    assert str(out) in stopped.error
    assert "is not writable (Read-only file system)" in stopped.error
    assert list(disk.iterdir()) == []


def test_a_run_that_may_write_no_more_says_so_and_goes_on_when_it_may(whole_run: Whole, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "run"
    stopped = whole_run.go(out, FULL["at the journal"], Forbid(out))
    assert stopped.code == 7, stopped
    assert str(out) in stopped.error
    assert "is not writable (Permission denied)" in stopped.error
    assert damages(out) == []
    for path in (out, *out.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    again = whole_run.go(out)
    assert again.code == 0, again.error
    whole_run.check(out)

"""A disk that is full, or read-only, at any moment of a run: a message, nothing lost, and on to the end."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.conftest import Whole
from tests.crash.reader import damages
from tests.crash.work import Fill, Point, Remount

pytestmark = pytest.mark.trl
MEGABYTES = 24
BEFORE_ANYTHING = Point("before locking", "run", 1)
FULL = {
    "before anything": BEFORE_ANYTHING,
    "in the trainer's own checkpoint": Point("after appending to", "run/metrics.jsonl", 6),
    "in a jump": Point("after making a folder", "run/jumps/0002", 1),
    "at the result": Point("before writing", "run/result.json", 1),
}


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


@pytest.mark.parametrize("moment", FULL)
def test_a_run_on_a_full_disk_goes_on_when_there_is_space(moment: str, whole_run: Whole, disk: Path) -> None:
    ballast, out = disk / "ballast", disk / "runs" / "run"
    stopped = whole_run.go(out, FULL[moment], Fill(ballast))
    assert stopped.code == 7, stopped
    assert stopped.error.startswith("StorageError: ")
    assert str(out) in stopped.error
    assert "free some space" in stopped.error
    assert damages(out) == []
    ballast.unlink()
    whole_run.ends(out)


def test_a_disk_that_is_read_only_is_named_before_anything_is_done(whole_run: Whole, disk: Path) -> None:
    out = disk / "runs" / "run"
    stopped = whole_run.go(out, BEFORE_ANYTHING, Remount(disk))
    assert stopped.code == 7, stopped
    assert str(out) in stopped.error
    assert "is not writable (Read-only file system)" in stopped.error
    assert list(disk.iterdir()) == []

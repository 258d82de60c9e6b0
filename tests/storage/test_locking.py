"""One process at a time in one folder; a process that is gone holds nothing."""

import os
import subprocess
import sys
from pathlib import Path

from next_core.storage.locking import hold, locked, release
from tests.errors import raises_kind

HOLD = """
import sys, time
from pathlib import Path
from next_core.storage.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_with_the_number_of_the_first_until_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with raises_kind("config-folder-in-use", folder, first.pid), locked(folder):
            pass
        first.kill()
    with locked(folder):
        assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_a_lock_can_be_taken_again_after_its_release_and_does_not_block_other_folders(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "run"):
            with raises_kind("config-folder-in-use", os.getpid()), locked(tmp_path / "run"):
                pass
            with locked(tmp_path / "other"):
                pass


def test_a_folder_can_be_held_twice_and_released_twice(tmp_path: Path) -> None:
    for _ in range(2):
        hold(tmp_path / "run")
        with raises_kind("config-folder-in-use"), locked(tmp_path / "run"):
            pass
    for _ in range(2):
        release(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []

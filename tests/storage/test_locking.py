"""One process at a time in one folder; a process that is gone holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from next_core.errors import ConfigError
from next_core.storage.locking import hold, locked, release

HOLD = """
import sys, time
from pathlib import Path
from next_core.storage.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_by_the_number_of_the_first_until_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run is in use by process {first.pid}; wait for it"), locked(folder):
            pass
        first.kill()
    with locked(folder):
        assert not folder.exists(), "the folder itself is the holder's affair"
    assert list(folder.parent.iterdir()) == []


def test_the_lock_can_be_taken_again_once_it_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "run"):
            with pytest.raises(ConfigError), locked(tmp_path / "run"):
                pass
            with locked(tmp_path / "other"):
                pass


def test_what_a_process_holds_it_can_go_on_to_hold_until_it_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        hold(tmp_path / "run")
        with pytest.raises(ConfigError), locked(tmp_path / "run"):
            pass
    for _ in range(2):
        release(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []

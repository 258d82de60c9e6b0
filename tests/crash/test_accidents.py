"""Two runs in one folder, and the signals that stop a run."""

import time
from pathlib import Path

import pytest

from tests.crash import small_run, work
from tests.crash.conftest import Whole
from tests.crash.processes import PATIENCE, Child, call
from tests.crash.reader import damages
from tests.crash.work import Pause, Point

pytestmark = pytest.mark.trl
STEP_5_IS_OVER = Point("after appending to", "run/metrics.jsonl", 5)


def test_a_second_run_in_one_folder_is_refused_and_the_first_ends_as_ever(whole_run: Whole, tmp_path: Path) -> None:
    out, waiting, on = tmp_path / "runs" / "run", tmp_path / "waiting", tmp_path / "on"
    first = Child(work.go, "run", whole_run.raw, out, STEP_5_IS_OVER, Pause(waiting, on))
    try:
        wait_for(waiting, first)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        second = whole_run.go(out)
        assert second.code == 2
        assert "[config-folder-in-use]" in second.error
        assert str(first.pid) in second.error
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    finally:
        on.touch()
    ended = first.ended()
    assert ended.code == 0, ended.error
    whole_run.check(out)


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        (work.interrupt, 130, "Ctrl-C stopped the run after step 5 of 14"),
        (work.terminate, 143, "SIGTERM stopped the run after step 5 of 14"),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_stopped_command_resumes(action: work.Action, code: int, said: str, whole_run: Whole, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "run"
    config = tmp_path / "config.yaml"
    config.write_text(small_run.dumped(whole_run.raw))
    ended = call(work.go, str(config), whole_run.raw, out, Point("after appending to", "run/metrics.jsonl", 4), action)
    message = Path(f"{config}.said").read_text()
    assert ended.code == code, message
    assert said in " ".join(message.split())
    assert "Traceback" not in message
    assert damages(out) == []
    assert (out / "trainer" / "checkpoint-5").is_dir()
    again = call(work.go, str(config), whole_run.raw, out)
    assert again.code == 0, Path(f"{config}.said").read_text()
    for extra in (out / "trainer").glob("checkpoint-5/*"):  # the uninterrupted run has none of this step
        extra.unlink()
    whole_run.check(out)


def wait_for(path: Path, child: Child) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert child.wait(0.02) is None, "it ended before"
        assert time.monotonic() < deadline

"""``next-core status``: of a run that is going, has ended, or was stopped."""

import json
import subprocess
import sys
from pathlib import Path

from next_core.storage.json_lines import json_line
from next_core.storage.locking import locked
from tests.cli.conftest import assert_fails, facts
from tests.conftest import Cli

START = {"event": "start", "step": 0, "steps": 20}
SCALES = [
    {"event": "scale", "step": step, "accepted": True, "reason": "", "multiple": m, "rate": m * 1e-4}
    for step, m in ((5, 1.0), (10, 4.0))
]
END = {"event": "end", "step": 20}


def write(folder: Path, *records: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "journal.jsonl").write_bytes(b"".join(json_line(record) for record in records))


def test_the_lock_and_the_journal_say_whether_a_run_is_going(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, START, *SCALES)
    assert facts(cli("status", run, "--json"))["state"] == "stopped early"
    write(run, START, SCALES[0] | {"accepted": False})
    assert "no multiple" in facts(cli("status", run, "--json"))["summary"][0]
    write(run, START, *SCALES)
    with locked(run):
        going = facts(cli("status", run, "--json"))
    assert (going["state"], going["step"], going["steps"]) == ("running", 10, 20)
    assert isinstance(going["process"], str)
    assert "0.0004" in going["summary"][0]
    write(run, START, *SCALES, END)
    shown = cli("status", run).out
    assert "finished: step 20 of 20" in shown
    assert "at most 0.0004" in shown


def test_it_follows_a_run_to_its_end_and_prints_what_is_new(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, START, SCALES[0])
    command = [sys.executable, "-m", "next_core", "status", run, "--follow", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        with locked(run):
            first = json.loads(following.stdout.readline())
            write(run, START, *SCALES, END)
            second = json.loads(following.stdout.readline())
        rest = [json.loads(line) for line in following.stdout]
    assert [one["step"] for one in (first, second)] == [5, 20]
    assert [one["state"] for one in rest] == ["finished"]
    assert following.returncode == 0


def test_a_folder_without_a_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    assert_fails(cli("status", tmp_path), 2, "report-unknown-folder", tmp_path)

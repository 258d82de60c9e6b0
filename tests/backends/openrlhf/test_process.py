"""No process of a trainer outlives us, however the trainer or we end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from next_backends.openrlhf.process import TrainerProcess, excerpt, leftovers
from next_core.errors import BackendError
from tests.backends.openrlhf.processes import begun_since, children

PYTHON = [sys.executable, "-I", "-S"]

# A daemon in a session of its own that ignores SIGTERM, a child whose environment is lost, and the command itself.
TREE = """
import os, signal, sys, time
folder, status = sys.argv[1:]
def stay(name, *arguments):
    os.write(1, f"{name} is up\\n".encode())
    open(f"{folder}/{name}.pid", "w").write(f"{os.getpid()}\\n")
    time.sleep(60)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stay("daemon")
    os._exit(0)
if os.fork() == 0:
    os.setsid()
    titled = f"import os, time; open('{folder}/titled.pid', 'w').write(f'{os.getpid()}\\\\n'); time.sleep(60)"
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", titled], {})
if status == "stay":
    stay("command")
while not all(os.path.exists(f"{folder}/{name}.pid") for name in ("daemon", "titled")):
    time.sleep(0.01)
sys.exit(int(status))
"""

OUR_SIDE = """
import os, sys, time
from pathlib import Path
from next_backends.openrlhf.process import TrainerProcess
folder, *command = sys.argv[1:]
folder = Path(folder)
with TrainerProcess.start(command, os.environ, folder / "trainer.log", folder / "scratch", grace=0.3) as trainer:
    (folder / "token").write_text(trainer.token)
    if (bystander := os.fork()) == 0:  # inherits the pipe
        time.sleep(60)
        os._exit(0)
    (folder / "bystander.pid").write_text(f"{bystander}\\n")
    while trainer.running:
        time.sleep(0.05)
"""


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)


def pid_in(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def tree(folder: Path, status: str) -> list[str]:
    return [*PYTHON, "-c", TREE, str(folder), status]


def alive(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.pid") if psutil.pid_exists(pid_in(path))]


def start(
    folder: Path, command: list[str], grace: float = 0.3, env: dict[str, str] | None = None, log: str = "trainer.log"
) -> TrainerProcess:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    (scratch / "session").write_text("x")
    return TrainerProcess.start(command, os.environ if env is None else env, folder / log, scratch, grace)


def python(source: str) -> list[str]:
    return [*PYTHON, "-c", source]


def ended(trainer: TrainerProcess) -> int:
    wait_until(lambda: not trainer.running)
    status = trainer.poll()
    assert status is not None
    return status


def open_files() -> set[tuple[str, str]]:
    """Numbers of our open files and what each is. A count alone would miss one that opens while an old one closes."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.add((file.name, str(file.readlink())))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    processes, files = children(), open_files()
    yield
    assert begun_since(processes) == []
    assert open_files() <= files


def test_stop_ends_daemons_and_those_whose_environment_is_lost(tmp_path: Path) -> None:
    with start(tmp_path, tree(tmp_path, "stay")) as trainer:
        pids = {pid_in(tmp_path / f"{name}.pid") for name in ("daemon", "titled", "command")}
        assert pids <= set(leftovers(trainer.token))
        assert os.getsid(trainer.pid) == trainer.pid  # a terminal's Ctrl-C is ours alone to pass on
        assert trainer.running
        trainer.check("before step 12")
        trainer.stop()
        assert (leftovers(trainer.token), alive(tmp_path), trainer.poll()) == ([], [], 128 + signal.SIGTERM)
        assert not (tmp_path / "scratch").exists()
        trainer.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_our_end_is_the_trainers_end(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "scratch").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", OUR_SIDE, str(tmp_path), *tree(tmp_path, "stay")], stderr=subprocess.DEVNULL
    ) as ours:
        for name in ("daemon", "titled", "command"):
            pid_in(tmp_path / f"{name}.pid")
        bystander = psutil.Process(pid_in(tmp_path / "bystander.pid"))
        ours.send_signal(number)
        assert ours.wait(30) == -number
    token = (tmp_path / "token").read_text()
    try:
        wait_until(lambda: not leftovers(token))
        assert alive(tmp_path) == ["bystander"]
        assert not (tmp_path / "scratch").exists()
    finally:
        bystander.kill()


@pytest.mark.parametrize("status", [0, 3])
def test_the_commands_end_ends_what_it_left_behind(tmp_path: Path, status: int) -> None:
    with start(tmp_path, tree(tmp_path, str(status))) as trainer:
        assert ended(trainer) == status
        assert {path.stem for path in tmp_path.glob("*.pid")} == {"daemon", "titled"}
        assert alive(tmp_path) == []
        assert not (tmp_path / "scratch").exists()


def test_a_killed_command_says_by_which_signal(tmp_path: Path) -> None:
    with start(tmp_path, python("import os; os.kill(os.getpid(), 9)")) as trainer:
        assert ended(trainer) == 137
        with pytest.raises(BackendError, match=r"status 137 \(SIGKILL, often for want of memory\).*it wrote nothing"):
            trainer.check()


def test_a_failed_command_is_told_with_its_last_lines(tmp_path: Path) -> None:
    source = "import sys; [print(f'line {n}', 'x' * 400, flush=True) for n in range(30)]; sys.exit('no such model')"
    with start(tmp_path, python(source)) as trainer:
        assert ended(trainer) == 1
        with pytest.raises(BackendError, match="the trainer ended before step 2, with status 1") as error:
            trainer.check("before step 2")
    head, *lines = str(error.value).splitlines()
    assert str(tmp_path / "trainer.log") in head
    assert len(lines) == 20
    assert lines[-1] == "no such model"
    assert lines[0].startswith("line 11 x")
    assert max(map(len, lines)) == 300


def test_a_good_end_is_a_failure_only_when_it_comes_too_early(tmp_path: Path) -> None:
    with start(tmp_path, python("print('done')")) as trainer:
        assert ended(trainer) == 0
        trainer.check()
        with pytest.raises(BackendError, match=r"ended before step 12, with status 0.*\ndone"):
            trainer.check("before step 12")


def test_output_is_appended(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with start(tmp_path, python(f"import sys; print({word!r}, file=sys.stderr)")) as trainer:
            ended(trainer)
    assert (tmp_path / "trainer.log").read_text() == "first\nsecond\n"


def test_the_excerpt_begins_at_the_last_traceback_and_keeps_its_error(tmp_path: Path) -> None:
    prefix = "\x1b[36m(PPOTrainer pid=7)\x1b[0m "
    log = tmp_path / "trainer.log"
    frames = [f'{prefix}  File "a.py", line {n}' for n in range(40)]
    noise = [f"noise {n}" for n in range(60)]
    lines = [f"{prefix}Traceback (most recent call last):", *frames, f"{prefix}ray.exceptions.RayTaskError: boom"]
    log.write_text("\n".join([*noise, *lines, *noise]))
    found = excerpt(log)
    assert len(found) == 20
    assert found[0].endswith("Traceback (most recent call last):")
    assert found[-1].endswith("RayTaskError: boom")
    log.write_text("\n".join([*noise, lines[0], lines[1], lines[-1], "after"]))
    assert excerpt(log)[0].endswith("Traceback (most recent call last):")
    assert excerpt(log)[-1] == "after"


def test_an_interrupt_sent_to_the_warden_reaches_the_command(tmp_path: Path) -> None:
    source = (
        f"import time, sys\ntry:\n open('{tmp_path}/up.pid', 'w').write('0\\n')\n time.sleep(60)\n"
        "except KeyboardInterrupt: sys.exit(7)"
    )
    with start(tmp_path, python(source), grace=60.0) as trainer:
        pid_in(tmp_path / "up.pid")
        os.kill(trainer.pid, signal.SIGINT)
        assert ended(trainer) == 7


def test_interrupts_in_a_row_are_passed_on_once_and_do_not_break_the_clean_up(tmp_path: Path) -> None:
    source = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: os.write(1, b'interrupted\\n'))\n"
        f"open('{tmp_path}/command.pid', 'w').write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(60)"
    )
    with start(tmp_path, python(source), grace=0.5) as trainer:
        pid_in(tmp_path / "command.pid")
        while trainer.running:
            os.kill(trainer.pid, signal.SIGINT)
            time.sleep(0.02)
        assert trainer.poll() == 128 + signal.SIGTERM
    assert (tmp_path / "trainer.log").read_text() == "interrupted\n"
    assert alive(tmp_path) == []
    assert not (tmp_path / "scratch").exists()


def test_stop_can_shorten_the_grace_period(tmp_path: Path) -> None:
    source = f"import signal, time; signal.signal(15, signal.SIG_IGN); open('{tmp_path}/up.pid', 'w').write('0\\n')"
    with start(tmp_path, python(source + "; time.sleep(60)"), grace=60.0) as trainer:
        pid_in(tmp_path / "up.pid")
        before = time.monotonic()
        trainer.stop(grace=0.2)
        assert time.monotonic() - before < 5.0
        assert trainer.poll() == 128 + signal.SIGKILL


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_under_the_log_hinders_no_clean_up(tmp_path: Path) -> None:
    (tmp_path / "full.log").symlink_to("/dev/full")
    source = "import os, sys\ntry: os.write(1, b'x')\nexcept OSError: sys.exit(5)"
    with start(tmp_path, python(source), log="full.log") as trainer:
        assert ended(trainer) == 5
        assert not (tmp_path / "scratch").exists()
    with start(tmp_path, [str(tmp_path / "missing")], log="full.log") as trainer:
        assert ended(trainer) == 127


def test_a_command_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    with start(tmp_path, [str(tmp_path / "bin" / "python")]) as trainer:
        assert ended(trainer) == 127
        with pytest.raises(BackendError, match=r"bin/python did not start: .*No such file"):
            trainer.check()
    assert not (tmp_path / "scratch").exists()


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BackendError, match="taken/trainer.log cannot be written"):
        start(tmp_path, python(""), log="taken/trainer.log")


def test_stop_replaces_a_warden_that_was_killed(tmp_path: Path) -> None:
    with start(tmp_path, tree(tmp_path, "stay")) as trainer:
        pids = {name: pid_in(tmp_path / f"{name}.pid") for name in ("daemon", "titled", "command")}
        os.kill(trainer.pid, signal.SIGKILL)
        assert ended(trainer) == 137
        assert {pids["daemon"], pids["command"]} <= set(leftovers(trainer.token))
        trainer.stop()
        wait_until(lambda: not leftovers(trainer.token) and not alive(tmp_path))
        assert not (tmp_path / "scratch").exists()


def test_the_command_gets_the_given_environment_and_no_other_open_file(tmp_path: Path) -> None:
    source = (
        "import json, os\n"
        "seen = [dict(os.environ), os.listdir('/proc/self/fd'), os.read(0, 1) == b'']\n"
        f"open('{tmp_path}/seen', 'w').write(json.dumps(seen))"
    )
    env = {"PATH": os.environ["PATH"], "ODD": "\udcff", "LARGE": "x" * 100_000, "LC_CTYPE": "C.UTF-8"}
    with start(tmp_path, python(source), env=env) as trainer:
        assert ended(trainer) == 0
    seen, files, no_input = json.loads((tmp_path / "seen").read_text())
    assert seen == env | {"NEXT_CORE_TRAINER": trainer.token, "SPT_NOENV": "1"}
    assert set(files) <= {"0", "1", "2", "3", "4"}  # the script's own and the listing's
    assert no_input

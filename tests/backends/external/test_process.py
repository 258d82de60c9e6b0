"""No process of a trainer outlives us, however the trainer or we end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from next_backends.external.process import TrainerProcess, leftovers
from tests.backends.external.processes import begun_since, children
from tests.errors import raises_kind

PYTHON = [sys.executable, "-I", "-S", "-c"]

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
from next_backends.external.process import TrainerProcess
folder, *command = sys.argv[1:]
folder = Path(folder)
trainer = TrainerProcess(command, os.environ, folder / "trainer.log", folder / "scratch", grace=0.3)
(folder / "token").write_text(trainer.token)
if (bystander := os.fork()) == 0:  # inherits the pipe
    time.sleep(60)
    os._exit(0)
(folder / "bystander.pid").write_text(f"{bystander}\\n")
while trainer.running:
    time.sleep(0.05)
"""


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)


def pid_in(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def tree(folder: Path, status: str) -> list[str]:
    return [*PYTHON, TREE, str(folder), status]


def up(folder: Path) -> set[int]:
    """The pids of the whole tree, once it stands."""
    return {pid_in(folder / f"{name}.pid") for name in ("daemon", "titled", "command")}


def alive(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.pid") if psutil.pid_exists(pid_in(path))]


@contextlib.contextmanager
def started(
    folder: Path, command: list[str], env: dict[str, str] | None = None, log: str = "trainer.log"
) -> Iterator[TrainerProcess]:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    (scratch / "session").write_text("x")
    trainer = TrainerProcess(command, os.environ if env is None else env, folder / log, scratch, grace=0.3)
    try:
        yield trainer
    finally:
        trainer.stop()
    assert not scratch.exists()


def python(source: str) -> list[str]:
    return [*PYTHON, source]


def ended(trainer: TrainerProcess) -> int:
    wait_until(lambda: not trainer.running)
    return trainer.poll()


def open_files() -> set[tuple[str, str]]:
    """Numbers of our open files and what each is. A count alone would miss one that opens while an old one closes."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((file.name, str(file.readlink())))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    processes, files = children(), open_files()
    yield
    assert begun_since(processes) == []
    assert open_files() <= files


def test_stop_ends_daemons_and_those_whose_environment_is_lost(tmp_path: Path) -> None:
    with started(tmp_path, tree(tmp_path, "stay")) as trainer:
        assert up(tmp_path) <= set(leftovers(trainer.token))
        assert os.getsid(trainer._supervisor.pid) == trainer._supervisor.pid  # a terminal's Ctrl-C is ours alone
        assert trainer.running
        trainer.check("before step 12")
        trainer.stop()
        assert (leftovers(trainer.token), alive(tmp_path), trainer.poll()) == ([], [], 128 + signal.SIGTERM)
        assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_our_end_is_the_trainers_end(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "scratch").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", OUR_SIDE, str(tmp_path), *tree(tmp_path, "stay")], stderr=subprocess.DEVNULL
    ) as ours:
        up(tmp_path)
        bystander = psutil.Process(pid_in(tmp_path / "bystander.pid"))
        ours.send_signal(number)
        assert ours.wait(60) == -number
    token = (tmp_path / "token").read_text()
    try:
        wait_until(lambda: not leftovers(token))
        assert alive(tmp_path) == ["bystander"]
        assert not (tmp_path / "scratch").exists()
    finally:
        bystander.kill()


@pytest.mark.parametrize("status", [0, 3])
def test_the_commands_end_ends_what_it_left_behind(tmp_path: Path, status: int) -> None:
    with started(tmp_path, tree(tmp_path, str(status))) as trainer:
        assert ended(trainer) == status
        assert {path.stem for path in tmp_path.glob("*.pid")} == {"daemon", "titled"}
        assert alive(tmp_path) == []
        assert not (tmp_path / "scratch").exists()


def test_a_signal_to_the_supervisor_ends_the_trainer_and_more_of_them_do_not_disturb_it(tmp_path: Path) -> None:
    with started(tmp_path, tree(tmp_path, "stay")) as trainer:
        up(tmp_path)
        while trainer.running:
            trainer._supervisor.terminate()
            time.sleep(0.02)
        assert (alive(tmp_path), trainer.poll()) == ([], 128 + signal.SIGTERM)


def test_stop_does_the_work_of_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    with started(tmp_path, tree(tmp_path, "stay")) as trainer:
        up(tmp_path)
        trainer._supervisor.kill()
        assert ended(trainer) == 137
        assert {pid_in(tmp_path / f"{name}.pid") for name in ("daemon", "command")} <= set(leftovers(trainer.token))
        trainer.stop()
        wait_until(lambda: not leftovers(trainer.token) and not alive(tmp_path))


@pytest.mark.parametrize(
    ("command", "status", "names"),
    [
        ([*PYTHON, "import os; os.kill(os.getpid(), 9)"], 137, ["SIGKILL", "out of memory"]),
        ([*PYTHON, "import sys; sys.exit('no such model')"], 1, ["no such model"]),
        (["/missing/bin/python"], 127, ["bin/python", "No such file"]),
    ],
)
def test_a_command_that_failed_is_reported(tmp_path: Path, command: list[str], status: int, names: list[str]) -> None:
    with started(tmp_path, command) as trainer:
        assert ended(trainer) == status
        with raises_kind("backend-process-lost", "before step 2", f"status {status}", tmp_path / "trainer.log", *names):
            trainer.check("before step 2")
        with raises_kind("backend-process-lost"):
            trainer.check()


def test_status_0_is_a_failure_only_if_it_comes_too_early(tmp_path: Path) -> None:
    with started(tmp_path, python("print('done')")) as trainer:
        assert ended(trainer) == 0
        trainer.check()
        with raises_kind("backend-process-lost", "before step 12", "done"):
            trainer.check("before step 12")
    with started(tmp_path, python("print('again')")) as trainer:
        ended(trainer)
    assert (tmp_path / "trainer.log").read_text() == "done\nagain\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_under_the_log_does_not_prevent_the_clean_up(tmp_path: Path) -> None:
    (tmp_path / "full.log").symlink_to("/dev/full")
    source = "import os, sys\ntry: os.write(1, b'x')\nexcept OSError: sys.exit(5)"
    for command, status in ((python(source), 5), ([str(tmp_path / "missing")], 127)):
        with started(tmp_path, command, log="full.log") as trainer:
            assert ended(trainer) == status
            assert not (tmp_path / "scratch").exists()


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with raises_kind("storage-not-writable", "taken/trainer.log"):
        TrainerProcess(python(""), {}, tmp_path / "taken" / "trainer.log", tmp_path / "scratch")


def test_the_command_gets_the_given_environment_and_no_other_open_file(tmp_path: Path) -> None:
    source = (
        "import json, os\n"
        "seen = [dict(os.environ), os.listdir('/proc/self/fd'), os.read(0, 1) == b'']\n"
        f"open('{tmp_path}/seen', 'w').write(json.dumps(seen))"
    )
    env = {"PATH": os.environ["PATH"], "ODD": "\udcff", "LARGE": "x" * 100_000, "LC_CTYPE": "C.UTF-8"}
    with started(tmp_path, python(source), env=env) as trainer:
        assert ended(trainer) == 0
    seen, files, no_input = json.loads((tmp_path / "seen").read_text())
    assert seen == env | {"NEXT_CORE_TRAINER": trainer.token, "SPT_NOENV": "1"}
    assert set(files) <= {"0", "1", "2", "3", "4"}  # the script's own and the listing's
    assert no_input

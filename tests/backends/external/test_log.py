"""The lines of the trainer's log that an error shows."""

from pathlib import Path

import pytest

from next_backends.external.log import excerpt, tail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.log"


def test_the_tail_is_what_a_terminal_would_show(path: Path) -> None:
    assert tail(path, 5) == []
    path.write_text("first\n\x1b[31mred\x1b[0m\n\n 0%|  | 0/2\r 50%|# | 1/2\r100%|##| 2/2\nlast\r\n")
    assert tail(path, 3) == ["red", "100%|##| 2/2", "last"]
    assert tail(path, 9)[0] == "first"


def test_the_tail_of_a_large_log_is_whole_lines(path: Path) -> None:
    path.write_text("".join(f"line {number} {'x' * 90}\n" for number in range(20_000)))
    lines = tail(path, 100_000)
    assert lines[-1].startswith("line 19999 ")
    assert all(line.startswith("line ") for line in lines)
    assert len(lines) < 20_000


def test_the_excerpt_is_the_end_of_a_log_without_traceback(path: Path) -> None:
    path.write_text("".join(f"line {number} {'x' * 400}\n" for number in range(30)) + "no such model\n")
    found = excerpt(path)
    assert (len(found), found[-1], max(map(len, found))) == (20, "no such model", 300)
    assert found[0].startswith("line 11 x")


def test_the_excerpt_begins_at_the_last_traceback_and_keeps_its_error(path: Path) -> None:
    prefix = "\x1b[36m(PPOTrainer pid=7)\x1b[0m "
    first, error = f"{prefix}Traceback (most recent call last):", f"{prefix}ray.exceptions.RayTaskError: boom"
    frames = [f'{prefix}  File "a.py", line {n}' for n in range(40)]
    noise = [f"noise {n}" for n in range(60)]
    path.write_text("\n".join([*noise, first, *frames, error, *noise]))
    found = excerpt(path)
    assert len(found) == 20
    assert found[0].endswith("Traceback (most recent call last):")
    assert found[-1].endswith("RayTaskError: boom")
    path.write_text("\n".join([*noise, first, frames[0], error, "after"]))
    assert excerpt(path)[0].endswith("Traceback (most recent call last):")
    assert excerpt(path)[-1] == "after"

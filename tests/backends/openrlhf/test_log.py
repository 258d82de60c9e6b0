"""The trainer's log is read as it grows, whatever else is written into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from next_backends.openrlhf import log
from next_backends.openrlhf.log import LogReader, Step, excerpt, tail

# As Ray forwards what OpenRLHF's logger prints in the controller.
PREFIX = "\x1b[36m(PPOTrainer pid=13763)\x1b[0m INFO 11-21 12:29:18 ppo_trainer.py:551] "
STEP = PREFIX + "✨ Global step 3: {'policy_loss': 0.1, 'kl': -2e-05, 'timing/step_total': 1.25, 'return': 1}\n"
STEP_3 = Step(3, {"policy_loss": 0.1, "kl": -2e-05, "timing/step_total": 1.25, "return": 1.0})
EVALUATION = (
    "(PPOTrainer pid=1) INFO 11-21 12:29:19 ppo_trainer.py:598] ✨ Evaluation completed in 1 day, 0:00:01, "
    "global_step 3, eval_metrics: {'eval_gsm8k_pass4': 0.5, 'eval_gsm8k_pass1': 0.25}\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.log"


@pytest.fixture
def reader(path: Path) -> LogReader:
    return LogReader(path)


def append(path: Path, text: str | bytes) -> None:
    with path.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def test_steps_come_in_order_and_once_and_evaluations_not_at_all(path: Path, reader: LogReader) -> None:
    assert reader.read() == []
    append(path, "noise\n" + STEP + "\x1b[33m(raylet)\x1b[0m more noise\n" + EVALUATION)
    assert reader.read() == [STEP_3]
    assert reader.read() == []
    append(path, STEP.replace("step 3", "step 4"))
    assert [record.number for record in reader.read()] == [4]
    assert LogReader(path).read() == []  # what is there was another trainer's


def test_a_line_torn_anywhere_is_read_once_it_is_whole(path: Path, reader: LogReader) -> None:
    found = []
    for byte in STEP.encode():
        append(path, bytes([byte]))
        found.append(reader.read())
    assert found[-1] == [STEP_3]
    assert not any(found[:-1])


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("'a': nan, 'b': inf, 'c': -inf, 'd': 1", {"d": 1.0}),
        (
            "'a': np.float64(0.5), 'b': tensor(-1.5, device='cuda:0'), 'c': None, 'd': [1], 'e': 'x'",
            {"a": 0.5, "b": -1.5},
        ),
        ("'infinite': 1", {"infinite": 1.0}),
    ],
)
def test_wrapped_numbers_are_read_and_all_that_is_not_finite_left_out(
    path: Path, reader: LogReader, metrics: str, expected: dict[str, float]
) -> None:
    append(path, f"Global step 1: {{{metrics}}}\n")
    assert reader.read() == [Step(1, expected)]


@pytest.mark.parametrize(
    "damaged",
    [
        "Global step 3: {'policy_loss': 0.1, 'k",
        "Global step 3: {'policy_loss': 0.1, (Actor pid=3) Loading weights} 'kl': 1}",
        "Global step 3: {'policy_loss': 0.1.5}",
        "Global step 3: {'a': 1if}",
        "Global step 3: {0.1, 0.2}",
        "Global step 3: {'a': " + "9" * 5000 + "}",
        "Global step 3: {'a': " + "-" * 5000 + "1}",
        "Global step 3: " + "{" * 5000 + "}" * 5000,
        b"\xff\xfe\x00",
    ],
    ids=lambda line: repr(line)[:60],
)
def test_a_damaged_line_is_skipped_and_the_next_one_read(path: Path, reader: LogReader, damaged: str | bytes) -> None:
    append(path, damaged)
    append(path, "\n" + STEP)
    assert reader.read() == [STEP_3]


def test_nothing_in_the_log_is_evaluated(path: Path, reader: LogReader, tmp_path: Path) -> None:
    mark = tmp_path / "evaluated"
    append(path, f"Global step 1: {{'a': open({str(mark)!r}, 'w'), 'c': 1.0}}\n" + STEP)
    assert STEP_3 in reader.read()
    assert not mark.exists()


def test_two_writers_in_one_line_are_both_read(path: Path, reader: LogReader) -> None:
    other = STEP.replace("step 3", "step 4").rstrip("\n")
    append(path, STEP.rstrip("\n") + other + "\x1b[32m [repeated 2x]\x1b[0m\n")
    assert reader.read() == [STEP_3, Step(4, STEP_3.metrics)]


def test_an_endless_line_is_passed_over(path: Path, reader: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LONGEST_LINE", 500)
    for _ in range(3):
        append(path, "x" * 400)
        assert reader.read() == []
    append(path, "\n" + STEP)
    assert reader.read() == [STEP_3]


def test_the_tail_is_what_a_terminal_would_show(path: Path) -> None:
    assert tail(path, 5) == []
    append(path, "first\n\x1b[31mred\x1b[0m\n\n 0%|  | 0/2\r 50%|# | 1/2\r100%|##| 2/2\nlast\r\n")
    assert tail(path, 3) == ["red", "100%|##| 2/2", "last"]
    assert tail(path, 9)[0] == "first"


def test_the_tail_of_a_large_log_is_whole_lines(path: Path) -> None:
    append(path, "".join(f"line {number} {'x' * 90}\n" for number in range(20_000)))
    lines = tail(path, 100_000)
    assert lines[-1].startswith("line 19999 ")
    assert all(line.startswith("line ") for line in lines)
    assert len(lines) < 20_000


def test_the_excerpt_is_the_end_of_a_log_without_traceback(path: Path) -> None:
    append(path, "".join(f"line {number} {'x' * 400}\n" for number in range(30)) + "no such model\n")
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

"""The trainer's log is read as it grows, whatever else is written into it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from next_backends.openrlhf import log
from next_backends.openrlhf.log import LogReader, Step, tail

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


def append(path: Path, text: str | bytes) -> None:
    with path.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def read_line(path: Path, line: str) -> list[Step]:
    append(path, line + "\n")
    return LogReader(path).read()


def test_steps_come_in_order_and_once_and_evaluations_not_at_all(path: Path) -> None:
    reader = LogReader(path)
    assert reader.read() == []
    append(path, "noise\n" + STEP + "\x1b[33m(raylet)\x1b[0m more noise\n" + EVALUATION)
    assert reader.read() == [STEP_3]
    assert reader.read() == []
    append(path, STEP.replace("step 3", "step 4"))
    assert [record.number for record in reader.read()] == [4]


def test_a_line_torn_anywhere_is_read_once_it_is_whole(path: Path) -> None:
    reader = LogReader(path)
    found = []
    for byte in STEP.encode():
        append(path, bytes([byte]))
        found.append(reader.read())
    assert found[-1] == [STEP_3]
    assert not any(found[:-1])


def test_nan_and_infinities_are_values(path: Path) -> None:
    [record] = read_line(path, "Global step 1: {'a': nan, 'b': inf, 'c': -inf}")
    assert math.isnan(record.metrics.pop("a"))
    assert record.metrics == {"b": math.inf, "c": -math.inf}


def test_wrapped_numbers_are_unwrapped_and_other_values_left_out(path: Path) -> None:
    line = "Global step 1: {'a': np.float64(0.5), 'b': tensor(-1.5, device='cuda:0'), 'c': None, 'd': [1], 'e': 'x'}"
    assert read_line(path, line) == [Step(1, {"a": 0.5, "b": -1.5})]


@pytest.mark.parametrize(
    "damaged",
    [
        "Global step 3: {'policy_loss': 0.1, 'k",
        "Global step 3: {'policy_loss': 0.1, (Actor pid=3) Loading weights} 'kl': 1}",
        "Global step 3: {'policy_loss': 0.1.5}",
        "Global step 3: {'a': 1if}",
        "Global step 3: {0.1, 0.2}",
        "Global step 3: {'a': " + "9" * 400 + "}",
        "Global step 3: {'a': " + "-" * 5000 + "1}",
        "Global step 3: " + "{" * 5000 + "}" * 5000,
    ],
    ids=lambda line: line[:60],
)
def test_a_damaged_line_is_skipped_and_the_next_one_read(path: Path, damaged: str) -> None:
    append(path, damaged + "\n" + STEP)
    assert LogReader(path).read() == [STEP_3]


def test_bytes_that_are_no_text_are_skipped(path: Path) -> None:
    append(path, b"\xff\xfe\x00\n" + STEP.encode())
    assert LogReader(path).read() == [STEP_3]


def test_nothing_in_the_log_is_evaluated(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "evaluated"
    line = f"Global step 1: {{'a': open({str(mark)!r}, 'w'), 'b': __import__('os').getpid(), 'c': 1.0}}"
    assert read_line(path, line) == [Step(1, {"c": 1.0})]
    assert not mark.exists()


def test_two_writers_in_one_line_are_both_read(path: Path) -> None:
    other = STEP.replace("step 3", "step 4").rstrip("\n")
    found = read_line(path, STEP.rstrip("\n") + other + "\x1b[32m [repeated 2x]\x1b[0m")
    assert found == [STEP_3, Step(4, STEP_3.metrics)]


def test_a_file_begun_anew_is_read_from_its_beginning(path: Path) -> None:
    append(path, "x" * 1000 + "\n" + STEP + "torn")
    reader = LogReader(path)
    assert reader.read() == [STEP_3]
    path.write_text(STEP)
    assert reader.read() == [STEP_3]


def test_a_call_reads_no_more_than_its_share(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "READ_AT_MOST", 100)
    append(path, STEP * 3)
    reader = LogReader(path)
    found = [reader.read() for _ in range(len(STEP.encode()) * 3 // 100 + 1)]
    assert [record for records in found for record in records] == [STEP_3] * 3
    assert max(map(len, found)) == 1


def test_an_endless_line_is_dropped_and_not_kept_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LONGEST_LINE", 500)
    reader = LogReader(path)
    for _ in range(3):
        append(path, "x" * 400)
        assert reader.read() == []
        assert len(reader._rest) <= 500
    append(path, STEP)  # the end of the endless line
    assert reader.read() == []
    append(path, STEP)
    assert reader.read() == [STEP_3]


def test_the_tail_is_what_a_terminal_would_show(path: Path) -> None:
    append(path, "first\n\x1b[31mred\x1b[0m\n\n 0%|  | 0/2\r 50%|# | 1/2\r100%|##| 2/2\nlast\r\n")
    assert tail(path, 3) == ["red", "100%|##| 2/2", "last"]
    assert tail(path, 9)[0] == "first"


def test_the_tail_of_a_large_log_is_whole_lines(path: Path) -> None:
    append(path, "".join(f"line {number} {'x' * 90}\n" for number in range(20_000)))
    lines = tail(path, 100_000)
    assert lines[-1].startswith("line 19999 ")
    assert all(line.startswith("line ") for line in lines)
    assert len(lines) < 20_000


def test_a_missing_log_has_no_tail(path: Path) -> None:
    assert tail(path, 5) == []

"""Reads the trainer's log as it grows: the metrics of its steps, and its last lines."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

READ_AT_MOST = 4 << 20
LONGEST_LINE = 1 << 18
_TAIL_BYTES = 1 << 18
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# The message of openrlhf/trainer/ppo_trainer.py.
_RECORD = re.compile(r"Global step (\d{1,12}): (?=\{)")


@dataclass(frozen=True)
class Step:
    """What the trainer said of one step."""

    number: int
    metrics: dict[str, float]


class LogReader:
    """Follows one log file, which need not exist yet; a file that has become shorter is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""
        self._in_long_line = False

    def skip(self) -> None:
        """Leave out what the file holds so far: another process wrote it."""
        self._offset = self.path.stat().st_size if self.path.exists() else 0
        self._rest, self._in_long_line = b"", False

    def read(self) -> list[Step]:
        """What was logged since the last call, in order; at most 4 MiB of log a call, so ask again while it lags."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self._rest, self._in_long_line = 0, b"", False
                file.seek(self._offset)
                new = file.read(READ_AT_MOST)
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if lines and self._in_long_line:
            lines, self._in_long_line = lines[1:], False
        if self._in_long_line or len(self._rest) > LONGEST_LINE:
            self._rest, self._in_long_line = b"", True
        return [record for line in lines if len(line) <= LONGEST_LINE for record in _records(_plain(line))]


def tail(path: Path, lines: int) -> list[str]:
    """The last non-blank lines as a terminal would show them: without colours or progress bars' earlier states."""
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, 2) - _TAIL_BYTES, 0)
            file.seek(start)
            found = file.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    if start > 0 and len(found) > 1:
        del found[0]
    shown = (_plain(line).rstrip().rpartition("\r")[2] for line in found)
    return [line for line in shown if line.strip()][-lines:]


def _plain(line: bytes) -> str:
    return _ANSI.sub("", line.decode(errors="replace"))


def _records(line: str) -> list[Step]:
    marks = list(_RECORD.finditer(line))
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    found: list[Step] = []
    for mark, end in zip(marks, ends, strict=False):
        metrics = _metrics(line[mark.end() : line.rfind("}", mark.end(), end) + 1])
        if metrics is not None:
            found.append(Step(int(mark[1]), metrics))
    return found


def _metrics(text: str) -> dict[str, float] | None:
    """The numbers of a dictionary as Python prints it; None for damaged text. Nothing is evaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.Dict):
            return None
        pairs = [(key, _number(value)) for key, value in zip(tree.keys, tree.values, strict=True)]
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return {
        key.value: number
        for key, number in pairs
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and number is not None
    }


def _number(node: ast.expr) -> float | None:
    """A number, nan and inf included, also as ``np.float64(0.1)`` or ``tensor(0.1, device='cuda:0')``."""
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return float(value)
        case ast.Name(id="nan" | "inf" as name):
            return float(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _number(operand)
            return None if number is None else -number
        case ast.Call(args=[first]):
            return _number(first)
    return None

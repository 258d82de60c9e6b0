"""The trainer's log: the metrics of its steps as it grows, and the lines that explain a failure."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST_LINE = 1 << 18
_TAIL_BYTES = 1 << 18
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_STEP = re.compile(r"Global step (\d{1,12}): (\{[^{}]*\})")  # the message of openrlhf/trainer/ppo_trainer.py
_WRAPPED = re.compile(r"\b[\w.]+\(([^(),]*)[^()]*\)")  # np.float64(0.1), tensor(0.1, device='cuda:0')
_NOT_FINITE = re.compile(r"-?\b(?:nan|inf)\b")
_RAY_PREFIX = re.compile(r"^\([^()]* pid=\d+[^()]*\) ?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Step:
    """What the trainer logged about one step."""

    number: int
    metrics: dict[str, float]
    """Finite numbers only."""


class LogReader:
    """Follows a log, which need not exist yet, from where it ends now: another process wrote what is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[Step]:
        """Return the steps logged since the last call. A last line without its end is left for the next call."""
        found: list[Step] = []
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                # Other programs write here too: of an endless line, only a part is in memory at a time.
                while (line := file.readline(LONGEST_LINE)).endswith(b"\n") or len(line) == LONGEST_LINE:
                    self._offset += len(line)
                    found += _steps(_plain(line))
        return found


def excerpt(log: Path, lines: int = 20, width: int = 300) -> list[str]:
    """Return the last traceback of the log and what follows, or its end; long lines and tracebacks are cut."""
    found = tail(log, 200)
    bare = [_RAY_PREFIX.sub("", line) for line in found]
    start = next((at for at in reversed(range(len(bare))) if bare[at].startswith("Traceback (most")), None)
    if start is None:
        chosen = found[-lines:]
    else:
        last = next((at for at in reversed(range(start, len(bare))) if _EXCEPTION.match(bare[at])), len(bare) - 1)
        chosen = found[start : max(last + 1, start + lines)]
        if len(chosen) > lines:
            chosen = [chosen[0], "...", *chosen[-lines + 2 :]]
    return [line[:width] for line in chosen]


def tail(path: Path, lines: int) -> list[str]:
    """Return the last non-blank lines as a terminal shows them: no colours, progress bars in their last state."""
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, 2) - _TAIL_BYTES, 0)
            file.seek(start)
            found = file.read(_TAIL_BYTES).split(b"\n")[start > 0 :]  # the first of a part is cut
    except OSError:
        return []
    shown = (_plain(line).rstrip().rpartition("\r")[2] for line in found)
    return [line for line in shown if line.strip()][-lines:]


def _plain(line: bytes) -> str:
    return _ANSI.sub("", line.decode(errors="replace"))


def _steps(line: str) -> Iterator[Step]:
    """Yield the steps of one line, into which two processes may have written. Damaged ones are skipped."""
    for number, text in _STEP.findall(line):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            found = ast.literal_eval(_NOT_FINITE.sub("None", _WRAPPED.sub(r"\1", text)))
            if isinstance(found, dict):
                yield Step(int(number), {key: float(v) for key, v in found.items() if isinstance(v, int | float)})

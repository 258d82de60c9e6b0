"""The lines of the trainer's log that explain a failure."""

import re
from pathlib import Path

_TAIL_BYTES = 1 << 18
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_RAY_PREFIX = re.compile(r"^\([^()]* pid=\d+[^()]*\) ?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b")


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
    shown = (_ANSI.sub("", line.decode(errors="replace")).rstrip().rpartition("\r")[2] for line in found)
    return [line for line in shown if line.strip()][-lines:]

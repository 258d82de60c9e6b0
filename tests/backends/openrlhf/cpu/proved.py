"""Has the code that drives OpenRLHF been proved against the real one as it stands?

Prints the hash of that code and of its tests; ``make test-openrlhf`` records it in ../proved.sha256 when they pass.
With --check nothing is printed, and the exit code is 1 unless the record is there and still holds.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
RECORD = ROOT / "tests" / "backends" / "openrlhf" / "proved.sha256"
PROVED = (
    "backends/next_backends/openrlhf",
    "backends/next_backends/history_folder.py",
    "next_core/cycle",
    "tests/backends/openrlhf",
)


def files() -> list[Path]:
    paths = [ROOT / name for name in PROVED]
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sorted(f for f in found if f.is_file() and f != RECORD and "__pycache__" not in f.parts)


def digest() -> str:
    """SHA-256 of the files' names and contents."""
    whole = hashlib.sha256()
    for file in files():
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        whole.update(f"{file.relative_to(ROOT).as_posix()} {content}\n".encode())
    return whole.hexdigest()


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        recorded = RECORD.read_text(encoding="utf-8").strip() if RECORD.exists() else None
        sys.exit(recorded != digest())
    print(digest())

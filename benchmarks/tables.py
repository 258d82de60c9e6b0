"""What the benchmarks' tables have in common: intervals over seeds, and the page that a table is written into.

python benchmarks/tables.py   # writes every table of docs/benchmarks anew from benchmarks/results; runs nothing
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "benchmarks"
SCRIPTS = ("tasks.py", "rates.py", "embedded.py", "races.py", "llm/run.py")


def mean(values: Sequence[float]) -> str:
    """Three decimals."""
    return f"{statistics.mean(values):.3f}"


def half_width(values: Sequence[float]) -> float | None:
    """Half of Student's 95% interval of their mean; None of fewer than two."""
    if len(values) < 2:
        return None
    return float(student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def interval(values: Sequence[float]) -> str:
    """Mean of differences and Student's 95% interval."""
    middle, half = statistics.mean(values), half_width(values)
    return f"{middle:+.3f}" if half is None else f"{middle:+.3f} ({middle - half:+.3f} to {middle + half:+.3f})"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [" | ".join(cells) for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def put(page: str, script: str, text: str) -> None:
    """Print a table, and write it between the marks of its page."""
    print(text)
    file = PAGES / page
    begin, end = f"<!-- table: made by benchmarks/{script} -->", "<!-- end of table -->"
    head, found, rest = file.read_text().partition(begin)
    if not found:
        raise SystemExit(f"{file} has no line '{begin}'")
    file.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    for name in SCRIPTS:
        subprocess.run([sys.executable, ROOT / "benchmarks" / name, "--table"], check=True)

"""The terminal recording of README.md and the charts of docs/report.md, from a real quickstart (two minutes).

python benchmarks/recording.py
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

from tables import ROOT

from next_core.drawing.elements import DARK
from next_core.storage.atomic import write_text

IMAGES = ROOT / "docs" / "images"
RUN = "next-core run examples/quickstart.yaml --out runs/quickstart --overwrite"
CHARTS = ("learning-curve", "figures", "displacement", "layers")
EACH = 0.4
"""Seconds between two lines of the recording."""
COLUMNS, ROW, GLYPH = 100, 17, 7.25
"""Characters of a line, and the pixels of a row and a character."""
FONT = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
STYLE = (
    f"text{{white-space:pre;fill:{DARK['ink']};opacity:0;animation:show .01s forwards}}"
    f"text:first-of-type{{fill:{DARK['c0']}}}@keyframes show{{to{{opacity:1}}}}"
    "@media(prefers-reduced-motion:reduce){text{animation:none;opacity:1}}"
)


def record(folder: Path) -> list[str]:
    """Run the command; return it and the lines that it wrote."""
    command = RUN.replace("runs/quickstart", str(folder / "quickstart")).split()
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    text = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT, check=True
    ).stdout.replace(str(folder), "runs")
    lines = [textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""] for line in text.rstrip().splitlines()]
    return [f"$ {RUN}", *(part.rstrip() for line in lines for part in line)]


def animated(lines: list[str]) -> str:
    """Return the lines as an SVG in which they appear one by one; at once for readers who want no motion."""
    width, height = round(28 + GLYPH * COLUMNS), ROW * (len(lines) + 1)
    texts = "".join(
        f'<text x="14" y="{ROW * (row + 1)}" style="animation-delay:{EACH * (row + 1):.1f}s">{html.escape(line)}</text>'
        for row, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONT}" font-size="12"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" rx="6" fill="{DARK["paper"]}"/>{texts}</svg>\n'
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_text(IMAGES / "quickstart.svg", animated(record(folder)))
        command = ["next-core", "report", str(folder / "quickstart"), "--figures", str(folder / "charts")]
        subprocess.run(command, check=True, cwd=ROOT)
        for name in CHARTS:
            shutil.copyfile(folder / "charts" / f"{name}.svg", IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()

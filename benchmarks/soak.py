"""Memory and open files of a long run: 2,000 steps of the quickstart with `auto`, watched from outside.

python benchmarks/soak.py            # writes benchmarks/results/soak.json and docs/images/soak.svg
python benchmarks/soak.py --draw     # only draws the picture anew
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import RESULTS, ROOT

from next_core.drawing import Axis, Line, Lines, Panel
from next_core.process.hardware import hardware
from next_core.storage.atomic import write_text

FILE, PICTURE = RESULTS / "soak.json", ROOT / "docs" / "images" / "soak.svg"
STEPS = 2000
SECONDS = 1.0
"""Between two looks at the process."""


def look(process: Path) -> tuple[float, int]:
    """Return a process's memory without mapped files, in MiB, and how many files it holds open."""
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024, len(list((process / "fd").iterdir()))


def measure() -> dict[str, Any]:
    """Train in a process of its own, and look at it until it ends."""
    import yaml

    from next_core.config import load_config

    config = load_config(ROOT / "examples" / "quickstart.yaml").model_dump(mode="json")
    config |= {"steps": STEPS, "control": "none", "predictor": "auto", "schedule": {}, "measure_every": 500}
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "soak.yaml", Path(scratch) / "run"
        file.write_text(yaml.safe_dump(config))
        training = subprocess.Popen(
            [sys.executable, "-m", "next_core", "run", file, "--out", out],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        metrics, found = out / "metrics.jsonl", []
        while training.poll() is None:
            time.sleep(SECONDS)
            logged = metrics.read_text().splitlines() if metrics.exists() else []
            steps = json.loads(logged[-1])["step"] if logged else 0
            if steps > (found[-1][0] if found else 0):
                try:
                    found.append((steps, *look(Path("/proc") / str(training.pid))))
                except (FileNotFoundError, KeyError):
                    break
        if training.wait():
            raise SystemExit(f"the run failed with exit code {training.returncode}")
    return {"hardware": hardware(), "steps": STEPS, "found": found}


def picture(found: list[list[float]]) -> Lines:
    """Memory above open files, by step."""
    steps, memory, files = zip(*found, strict=True)
    panels = [
        Panel([Line("memory", steps, memory)], Axis("memory, MiB", 0)),
        Panel([Line("open files", steps, files, colour="c1")], Axis("open files", 0), share=0.6),
    ]
    return Lines("soak", panels, Axis("RL step"), height=260)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw the committed results; run nothing")
    if not parser.parse_args().draw:
        FILE.write_text(json.dumps(measure()) + "\n")
    found = json.loads(FILE.read_text())["found"]
    write_text(PICTURE, picture(found).svg())
    for tenth in found[:: max(1, len(found) // 10)]:
        print(*tenth)


if __name__ == "__main__":
    main()

"""Pages in a real browser: nothing overlaps or is cut off, and everything can be read, in four ways of looking."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from next_core.report import geometry
from next_core.report.geometry import GeometryOptions
from next_core.report.write import write_report
from next_core.storage.json_lines import json_line
from tests.conftest import MakeRun
from tests.proved import BROWSERS
from tests.report.made import Object, comparison, jumps, write_comparison

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
CHECK = Path(__file__).with_name("check_page.js")
WIDTHS = (1400, 400)
pytestmark = [pytest.mark.pages, pytest.mark.skipif(not BROWSER, reason="needs Chromium")]


def callback_run(folder: Path, *records: Object, every: int = 1) -> Path:
    """A callback's folder: 120 steps with a rising reward."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": "Qwen/Qwen2.5-1.5B-Instruct", "task": "DeepScaleR-Preview", "rollouts": 1024}
    about |= {"learning_rate": 1e-6, "date": "2026-11-30", "algorithm": "grpo"}
    about["hardware"] = "96 CPU cores (AMD EPYC 9654), 8 x NVIDIA H200"
    lines = [{"event": "start", "step": 0, "steps": 120, "about": about}, *records, {"event": "end", "step": 120}]
    (folder / "journal.jsonl").write_bytes(b"".join(map(json_line, lines)))
    logged = [{"step": step, "reward": 0.2 + step / 200, "reward_std": 0.45} for step in range(1, 121, every)]
    (folder / "metrics.jsonl").write_bytes(b"".join(map(json_line, logged)))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Pages of every kind, by name."""
    top = tmp_path_factory.mktemp("pages")
    found: dict[str, Path] = {}

    def add(name: str, *folders: Path) -> None:
        out = top / f"{name}.html"
        found[name] = write_report(list(folders), out, settings=GeometryOptions(wanted=False)).out

    rates = [{"step": step, "multiple": step / 2, "rate": step * 5e-7} for step in range(5, 121, 5)]
    scales = [{"event": "scale", "accepted": True} | rate for rate in rates]
    text = "Raise learning_rate to about 6e-05. Step scaling used 3e-05 to 6e-05 once it had found the rate."
    scaled = callback_run(top / "scaled", *scales, {"event": "advice", "step": 120, "text": text})
    made = [{"event": "jump", **jump} for jump in jumps(range(20, 110, 4), 3, "adaptive-secant", multiple=True)]
    jumped = callback_run(top / "jumped", *made, every=5)
    add("scaled", scaled)
    add("jumped", jumped)
    add("runs", scaled, jumped)
    add("empty", callback_run(top / "empty", every=500))
    for seeds, extra in ((1, 6), (2, 0), (3, 2)):
        race = comparison(seeds, extra)
        race["arms"]["an arm whose name is very long indeed"] = race["arms"]["secant"]
        add(f"comparison-{seeds}", write_comparison(top / f"race{seeds}", race))
    return found


def problems(folder: Path, pages: Mapping[str, Path], scheme: str) -> dict[str, list[str]]:
    """Return what the browser finds wrong on each page at each width."""
    frames = []
    for name, page in pages.items():
        text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
        copy = folder / page.name
        copy.write_text(text.replace("</body>", f"<script>{CHECK.read_text()}</script></body>"))
        frames += [f'<iframe name="{name} at {w}" src="{copy.name}" width="{w}" height="900"></iframe>' for w in WIDTHS]
    listen = "onmessage = ({data}) => out.append(JSON.stringify([data.name, data.problems]) + '\\n')"
    wrapper = folder / f"{scheme}.html"
    wrapper.write_text(f"<pre id='out'></pre><script>{listen}</script>{''.join(frames)}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / scheme}", "--dump-dom"]
    flags += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--virtual-time-budget=60000"]
    command = [BROWSER, *flags, "--window-size=1600,1200", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = html.unescape(done.stdout.split('<pre id="out">')[1].split("</pre>")[0]).splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_covered_or_hard_to_read(pages: Mapping[str, Path], scheme: str, tmp_path: Path) -> None:
    found = problems(tmp_path, pages, scheme)
    assert found.keys() == {f"{name} at {width}" for name in pages for width in WIDTHS}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_maps_of_weights_are_readable(make_lora_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "CUTS", 3)
    monkeypatch.setattr(geometry, "DRAWS", 2)
    run = make_lora_run(tmp_path / "run" / "checkpoints")
    callback_run(run.path.parent)
    written = write_report(run.path.parent, tmp_path / "weights.html")
    for scheme in ("light", "dark"):
        found = problems(tmp_path, {"weights": written.out}, scheme)
        assert found == {f"weights at {width}": [] for width in WIDTHS}

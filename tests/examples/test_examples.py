"""The scripts of the examples run, and the examples differ only where they say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from next_core.config import load_config
from next_core.storage.yaml_files import parse_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_openrlhf_example_is_the_quickstart_with_another_backend() -> None:
    ours, quickstart = (load_config(EXAMPLES / name) for name in ("openrlhf.yaml", "quickstart.yaml"))
    assert (ours.backend.name, quickstart.backend.name) == ("openrlhf", "trl")
    raw = [parse_yaml((EXAMPLES / name).read_text(), name) for name in ("openrlhf.yaml", "quickstart.yaml")]
    for config in raw:
        del config["backend"]
    assert raw[0] == raw[1]


@pytest.mark.trl
def test_the_trl_script_with_one_more_line_jumps(tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "trl_callback.py"), "--steps", "65", "--observe", "40"]
    done = subprocess.run([*script, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # The gate compares two windows of 25 steps, which step 40 does not have yet.
    assert "step 40: no jump (gate: no checkpoint 50 steps before step 40" in done.stdout
    assert "step 50: jumped (14 of 14 matrices)" in done.stdout

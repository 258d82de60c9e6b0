"""The TRL backend imports its packages when they are needed, and names what is missing."""

import subprocess
import sys
import textwrap
from pathlib import Path

import yaml

from tests.crash import small_run

WITHOUT = """
import sys
for name in ("transformers", "trl", "peft"):
    sys.modules[name] = None
from pathlib import Path
from next_core.config import load_config
from next_core.errors import NextCoreError
from next_core.plugins import make_chosen

config = load_config(sys.argv[1])
for use in (
    lambda: make_chosen("backend", config.backend).prepare(config, Path(sys.argv[2])),
    lambda: __import__("next_backends.trl", fromlist=["PredictExtendCallback"]).PredictExtendCallback,
):
    try:
        use()
    except NextCoreError as error:
        print(error.kind, error.message)
"""


def test_a_config_is_checked_without_transformers_and_training_names_the_package(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_run.raw_config(tmp_path / "data")))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT), str(path), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    for line in lines:
        assert line.startswith("config-missing-package ")
        assert "pip install 'next-core[trl]'" in line

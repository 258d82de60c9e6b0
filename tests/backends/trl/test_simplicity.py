"""What keeps the TRL backend light: few frames between an event and a weight, and no import before it is needed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from next_backends.trl import PredictExtendCallback
from next_core.live_weights.in_memory import InMemoryApplied
from tests.crash import small_run

OURS = ("next_core.", "next_backends.", "next_predictors.")


@pytest.mark.trl
def test_eight_of_our_frames_at_most_lead_from_the_end_of_a_step_to_the_weights(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[list[str]] = []
    write = InMemoryApplied.write

    def watched(self: InMemoryApplied, *arguments: Any) -> None:
        frames = [info for info in inspect.stack()[1:] if str(info.frame.f_globals.get("__name__")).startswith(OURS)]
        paths.append([info.function for info in reversed(frames)] + ["write"])
        write(self, *arguments)

    monkeypatch.setattr(InMemoryApplied, "write", watched)
    schedule = {"observe": 2, "every": 1, "horizon": 1}
    make_trainer([PredictExtendCallback({"name": "secant", "window": 1}, **schedule)], steps=3).train()
    assert paths
    for path in paths:
        assert path[0] == "on_step_end"
        assert len(path) <= 8, path


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

"""``pip install next-core[trl]`` is enough: the wheel in an empty environment, away from the checkout."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Environment, call

pytestmark = pytest.mark.packaging


def test_the_wheel_carries_the_three_packages_and_their_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("next_core", "next_backends", "next_predictors"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert not any(name.startswith(("tests", "examples", "benchmarks")) for name in names)


def test_a_user_installs_the_wheel_and_runs_the_command_line(installed: Environment, tmp_path: Path) -> None:
    next_core = installed.next_core
    listed = json.loads(call(next_core, "plugins", "--json", cwd=tmp_path).stdout)["plugins"]
    assert {entry["status"] for entry in listed} == {"ok"}
    assert {"secant", "next-mlp", "trl", "math-verify"} <= {entry["name"] for entry in listed}
    where = call(installed.python, "-c", "import next_core; print(next_core.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(installed.folder))

    config = f"""
steps: 6
training:
  model: {ROOT}/examples/arithmetic/base
  data: {{train: {ROOT}/examples/arithmetic/train.jsonl, test: {ROOT}/examples/arithmetic/validation.jsonl}}
  prompts_per_step: 4
  generations: 4
  max_new_tokens: 4
  learning_rate: 1e-3
predictor: secant
schedule: {{observe: 4, every: 2, horizon: 2}}
"""
    (tmp_path / "run.yaml").write_text(config)
    call(next_core, "run", "run.yaml", "--out", "run", cwd=tmp_path)
    done = call(
        next_core,
        "extrapolate",
        "--checkpoints",
        "run/checkpoints",
        "--horizon",
        "2",
        "--out",
        "next",
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(done.stdout.splitlines()[-1])["moved"] == 14
    assert (tmp_path / "next" / "adapter_model.safetensors").exists()

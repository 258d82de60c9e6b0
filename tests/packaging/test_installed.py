"""The wheel and the example plug-in, installed into one empty environment; nothing of the checkout is on its path."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to succeed, away from this environment's packages. Returns its output."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plug-in, copied as its author has it."""
    folder = tmp_path_factory.mktemp("copied") / "plugin"
    return Path(shutil.copytree(ROOT / "examples/plugin", folder, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def binaries(wheel: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a virtual environment with the wheel, its extra ``trl`` and the plug-in."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True)
    # Compiling every module of torch and transformers takes longer than installing them; Python does it as needed.
    pip = (folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    pins = ("-c", ROOT / "constraints.txt")
    call(*pip, *pins, "torch==2.13.0", cwd=folder)
    call(*pip, *pins, f"{wheel}[trl]", f"{plugin}[test]", cwd=folder)
    return folder / "bin"


def test_the_wheel_has_the_three_packages_and_their_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("next_core", "next_backends", "next_predictors"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert not any(name.startswith(("tests", "examples", "benchmarks")) for name in names)


def test_built_in_and_third_party_plugins_are_listed(binaries: Path, tmp_path: Path) -> None:
    listed = json.loads(call(binaries / "next-core", "plugins", "--json", cwd=tmp_path))["plugins"]
    assert {entry["status"] for entry in listed} == {"ok"}
    assert {"secant", "next-mlp", "trl", "math-verify"} <= {entry["name"] for entry in listed}
    assert {e["name"] for e in listed if e["distribution"] == "curved-steps"} == {"last-step", "parabola"}


def test_the_plugins_own_tests_pass(binaries: Path, plugin: Path) -> None:
    last = call(binaries / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=plugin).splitlines()[-1]
    assert "passed" in last
    assert "failed" not in last


def test_the_kit_needs_no_pytest(binaries: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['pytest'] = None; import next_core.testing; print(next_core.testing.__file__)"
    assert call(binaries / "python", "-c", code, cwd=tmp_path).startswith(str(binaries.parent))


def test_a_user_trains_with_the_plugins_predictor_and_extrapolates(binaries: Path, tmp_path: Path) -> None:
    config = f"""
steps: 8
training:
  model: {ROOT}/examples/arithmetic/base
  data: {{train: {ROOT}/examples/arithmetic/train.jsonl, test: {ROOT}/examples/arithmetic/validation.jsonl}}
  prompts_per_step: 4
  generations: 4
  max_new_tokens: 4
  learning_rate: 1e-3
predictor: {{name: parabola, damping: 0.25}}
schedule: {{observe: 6, every: 2, horizon: 2, jump_every: 6}}
"""
    (tmp_path / "run.yaml").write_text(config)
    call(binaries / "next-core", "run", "run.yaml", "--out", "run", cwd=tmp_path)
    assert '"step": 6' in (tmp_path / "run/journal.jsonl").read_text()
    command = ("extrapolate", "--checkpoints", "run/checkpoints", "--horizon", "2", "--out", "next", "--json")
    done = call(binaries / "next-core", *command, cwd=tmp_path)
    assert json.loads(done.splitlines()[-1])["moved"] == 14
    assert (tmp_path / "next" / "adapter_model.safetensors").exists()

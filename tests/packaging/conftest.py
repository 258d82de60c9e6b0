"""The wheel, and an empty environment that it is installed in, made once; nothing of the checkout is on its path."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that has to succeed, away from this environment's packages."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel and its extra ``trl``."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def next_core(self) -> Path:
        return self.folder / "bin" / "next-core"

    def install(self, *what: str | Path) -> None:
        pins = ["-c", ROOT / "constraints.txt"]
        # To compile every module of torch and transformers takes longer than to install them; Python does it as needed.
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *pins]
        call(*pip, *what, cwd=self.folder)


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("installed") / "venv")
    venv.create(made.folder, with_pip=True)
    made.install("torch==2.13.0")
    made.install(f"{wheel}[trl]")
    return made

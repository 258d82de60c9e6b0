"""Environments outside the tree for the tests that need more than .venv. Imports the standard library alone."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

STAMP = ".next-core-stamp"


def call(*command: str | Path, **settings: str) -> None:
    """Run a command with more environment variables; its failure is an error."""
    subprocess.run(command, check=True, env=os.environ | settings)


def pip(python: Path, *arguments: str | Path, **settings: str) -> None:
    call(python, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", **settings)


def make(folder: Path, sources: Iterable[Path], notice: str, fill: Callable[[Path], None]) -> None:
    """Make the environment in ``folder``, and ``fill`` it; nothing is done if that was done from the same sources."""
    stamp = folder / STAMP
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, Path(__file__)))).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"Making {folder} ({notice})", flush=True)
    python = folder / "bin" / "python"
    if not python.exists():
        call(sys.executable, "-m", "venv", folder)
    fill(python)
    stamp.write_text(wanted, encoding="utf-8")


def install_torch(python: Path, version: str, constraints: Path, target: str) -> None:
    """Install torch before what depends on it, and name the remedy where pip finds no such build."""
    try:
        pip(python, "install", "--constraint", constraints, f"torch=={version}")
    except subprocess.CalledProcessError:
        remedy = f"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make {target}"
        sys.exit(f"pip finds no torch {version}; if it looks at PyPI only: {remedy}")

"""Makes the environment in which TRL trains under DeepSpeed without a GPU: ``make distributed-env``.

It holds what the tree pins, DeepSpeed, and next-core's metadata: the tests put the code they test in front.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.backends.environment import install_torch, make, pip

ROOT = Path(__file__).parents[4]
CONSTRAINTS = ROOT / "constraints.txt"
BUILD = ("setuptools", "wheel", "ninja")
DEEPSPEED = "deepspeed==0.19.8"


def fill(python: Path) -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    torch = next(line.partition("==")[2] for line in lines if line.startswith("torch=="))
    install_torch(python, torch, CONSTRAINTS, "distributed-env")
    pip(python, "install", "--constraint", CONSTRAINTS, "--editable", f"{ROOT}[trl]", "pytest", *BUILD)
    # It is built with the torch that is there, and without its kernels.
    pip(python, "install", "--constraint", CONSTRAINTS, "--no-build-isolation", DEEPSPEED, DS_BUILD_OPS="0")


if __name__ == "__main__":
    sources = [CONSTRAINTS, ROOT / "pyproject.toml", Path(__file__)]
    make(Path(sys.argv[1]).expanduser().absolute(), sources, "once: 1.7 GB, and some 3 minutes", fill)

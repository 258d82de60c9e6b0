"""What a figure was measured on: package versions and the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("next-core", "torch", "transformers", "trl", "peft", "safetensors", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Return processor, cores, and the accelerators that torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = f", {count} x {torch.cuda.get_device_name(0)}" if count else ""
    return f"{os.cpu_count()} CPU cores ({_processor()}){gpus}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - not a file of ours
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()

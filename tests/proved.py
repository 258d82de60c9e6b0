"""Which long proofs hold for the code as it stands? A proof is a target of the Makefile that takes minutes.

With a target's name the hash of the code and tests that it covers is printed; the Makefile records it in proofs/ when
the proof passes. With --stale the targets are printed whose record is missing or of other code;
test-pages only where a browser is installed.
"""

import hashlib
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests" / "proofs"
READERS = ("next_core/storage",)
HISTORY = "backends/next_backends/history_folder.py"
COVERS: dict[str, tuple[str, ...]] = {
    "fuzz": (
        *READERS,
        "next_core/sources",
        "next_core/appliers",
        "tests/appliers/matrix.py",
        "next_core/config.py",
        "next_core/run_config.py",
        "next_core/comparison/comparison_config.py",
        "next_core/report/inputs.py",
        "next_core/cycle/journal.py",
        "next_core/cycle/run_result.py",
        "tests/fuzz",
    ),
    "test-crash": (*READERS, "next_core/cycle", "backends/next_backends/trl", HISTORY, "tests/crash"),
    "test-processes": (
        "backends/next_backends/trl",
        "next_core/live_weights",
        "tests/backends/trl/test_processes.py",
        "tests/backends/trl/two_processes.py",
        "tests/backends/trl/launch.py",
    ),
    "test-distributed": (
        "backends/next_backends/trl",
        "backends/next_backends/sharding.py",
        "next_core/live_weights",
        "tests/backends/environment.py",
        "tests/backends/trl/distributed",
        "tests/backends/trl/launch.py",
    ),
    "test-vllm": (
        "backends/next_backends/trl",
        "next_core/live_weights",
        "tests/backends/environment.py",
        "tests/backends/openrlhf/cpu/shim/cpu_vllm.py",
        "tests/backends/trl/vllm",
        "tests/backends/trl/conftest.py",
    ),
    "test-verl": (
        "backends/next_backends/external",
        "backends/next_backends/verl",
        "backends/next_backends/sharding.py",
        HISTORY,
        "next_core/cycle",
        "next_core/live_weights",
        "next_core/sources/fsdp_shards.py",
        "next_core/sources/adapter_files.py",
        "next_core/sources/hf_model.py",
        "next_core/appliers/verl_applier.py",
        "tests/backends/environment.py",
        "tests/backends/external/real.py",
        "tests/backends/verl",
        "tests/sources/verl",
    ),
    "test-base": ("examples/arithmetic", "examples/task_kit.py"),
    "test-packaging": (
        "pyproject.toml",
        "examples/plugin",
        "next_core/plugins.py",
        "next_core/hookspecs.py",
        "next_core/testing",
        "tests/packaging",
    ),
    "test-pages": ("next_core/drawing", "next_core/diagnostics/plots.py", "next_core/report", "tests/report"),
    "test-openrlhf": (
        "backends/next_backends/external",
        "backends/next_backends/openrlhf",
        "backends/next_backends/sharding.py",
        "next_core/live_weights",
        HISTORY,
        "next_core/cycle",
        "tests/backends/environment.py",
        "tests/backends/external",
        "tests/backends/openrlhf",
        "tests/backends/trl/launch.py",
    ),
}


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
"""The commands of a browser that looks at pages; the first one there is used."""


def files(target: str) -> list[Path]:
    """What a proof covers."""
    paths = [ROOT / name for name in COVERS[target]]
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sorted(file for file in found if file.is_file() and "__pycache__" not in file.parts)


def digest(target: str) -> str:
    """SHA-256 of the files' names and contents."""
    whole = hashlib.sha256()
    for file in files(target):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        whole.update(f"{file.relative_to(ROOT).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def holds(target: str) -> bool:
    """Whether the proof was passed by the code as it is."""
    record = RECORDS / f"{target}.sha256"
    return record.is_file() and record.read_text(encoding="utf-8").strip() == digest(target)


if __name__ == "__main__":
    if sys.argv[1:] == ["--stale"]:
        browser = any(map(shutil.which, BROWSERS))
        print(*(target for target in COVERS if not holds(target) and (browser or target != "test-pages")))
    else:
        print(digest(*sys.argv[1:]))

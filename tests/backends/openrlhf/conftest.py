"""The real OpenRLHF on a CPU, and runs with a pretend trainer in its place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends.external.pretence import Pretence
from tests.backends.external.real import environment, python_of

CPU = Path(__file__).parent / "cpu"


@pytest.fixture
def pretence(tmp_path: Path) -> Iterator[Pretence]:
    with Pretence(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def openrlhf_python() -> Path:
    """The Python that OpenRLHF is installed for."""
    return python_of("openrlhf")


@pytest.fixture(scope="session")
def openrlhf_env() -> dict[str, str]:
    """Environment variables with which it needs no GPU and no network."""
    return {
        "PYTHONPATH": str(CPU / "shim"),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(environment("openrlhf").parent / "openrlhf-torch-extensions"),
        "MAX_JOBS": "2",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@pytest.fixture(scope="session")
def openrlhf_backend(openrlhf_python: Path, openrlhf_env: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """``openrlhf_backend(**changes)``: a whole ``backend:`` block; a change that is a dict goes into its block."""

    def make(**changes: Any) -> dict[str, Any]:
        block: dict[str, Any] = {
            "name": "openrlhf",
            "python": str(openrlhf_python),
            "env": openrlhf_env,
            "gpus": 1,
            "micro_batch": 8,
            "ray": {"num_gpus": 4, "num_cpus": 8, "object_store_mib": 300},
            "vllm": {"engines": 1, "gpu_memory": 0.1, "sync": "gloo", "eager": True},
            "deepspeed": {"zero_stage": 2, "attention": "eager"},
        }
        merged = {k: block[k] | v if isinstance(v, dict) and k in block else v for k, v in changes.items()}
        return block | merged

    return make

"""The real verl on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backends.external.real import python_of

CPU = Path(__file__).parent / "cpu"
OVERRIDES = (
    "trainer.device=cpu",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
)


@pytest.fixture(scope="session")
def verl_python() -> Path:
    """The Python that verl is installed for."""
    return python_of("verl")


@pytest.fixture(scope="session")
def verl_backend(verl_python: Path) -> Callable[..., dict[str, Any]]:
    """``verl_backend(**changes)``: a whole ``backend:`` block; ``env`` and ``overrides`` are added to."""

    def make(**changes: Any) -> dict[str, Any]:
        env = {
            "PYTHONPATH": str(CPU),
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
            "VERL_ENGINE_DEVICE": "cuda",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        fsdp = {"dtype": "float32", "attention": "sdpa", "remove_padding": False, "gradient_checkpointing": False}
        block = {
            "name": "verl",
            "python": str(verl_python),
            "gpus": 1,
            "micro_batch": 32,
            "max_prompt": 16,
            "fsdp": fsdp,
        }
        added = {"env": env | changes.pop("env", {}), "overrides": [*OVERRIDES, *changes.pop("overrides", ())]}
        return block | added | changes

    return make

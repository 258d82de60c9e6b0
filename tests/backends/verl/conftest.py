"""The real verl on a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from next_backends.external.trainer import Trainer

CPU = Path(__file__).parent / "cpu"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-core"
ENVIRONMENT = Path(os.environ.get("VERL_ENV") or CACHE / "verl-venv").expanduser().absolute()
OVERRIDES = (
    "trainer.device=cpu",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
)


@pytest.fixture(scope="session")
def verl_python() -> Path:
    """The Python that verl is installed for."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.fail(f"verl is not installed in {ENVIRONMENT}: run `make verl-env`")
    return python


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
        block: dict[str, Any] = {
            "name": "verl",
            "python": str(verl_python),
            "gpus": 1,
            "micro_batch": 32,
            "max_prompt": 16,
            "fsdp": {
                "dtype": "float32",
                "attention": "sdpa",
                "remove_padding": False,
                "gradient_checkpointing": False,
            },
        }
        added = {
            "env": env | changes.pop("env", {}),
            "overrides": [*OVERRIDES, *changes.pop("overrides", ())],
        }
        return block | added | changes

    return make


@contextlib.contextmanager
def replaced(name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let ``replacement(real, trainer, ...)`` stand for a method of ``Trainer``."""
    real = getattr(Trainer, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, name, lambda *arguments, **more: replacement(real, *arguments, **more))
        yield


def killing(step: int) -> contextlib.AbstractContextManager[None]:
    """Kill the trainer when it has paused after ``step``."""

    def train(real: Any, trainer: Trainer, until: int) -> None:
        real(trainer, until)
        if until == step:
            for process in psutil.Process(trainer.process._supervisor.pid).children(recursive=True):
                process.kill()

    return replaced("train", train)

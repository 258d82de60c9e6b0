"""What the tests of real trainers share: their environments, a run of the arithmetic task, and how a trainer dies."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

from next_backends.external.trainer import Trainer
from next_core.config import make_config
from next_core.run_config import RunConfig

TASK = Path(__file__).parents[3] / "examples" / "arithmetic"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "next-core"


def environment(name: str) -> Path:
    """The folder that ``make NAME-env`` installs into."""
    return Path(os.environ.get(f"{name.upper()}_ENV") or CACHE / f"{name}-venv").expanduser().absolute()


def python_of(name: str) -> Path:
    """The Python of an environment; a test that needs one which is not there fails."""
    python = environment(name) / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{name} is not installed in {environment(name)}: run `make {name}-env`")
    return python


def arithmetic_run(backend: dict[str, Any], training: Mapping[str, Any], **changes: Any) -> RunConfig:
    """A run of six steps with a jump after the third."""
    block = {
        "steps": 6,
        "training": {
            "model": str(TASK / "base"),
            "data": {split: str(TASK / f"{split}.jsonl") for split in ("train", "validation")},
            "learning_rate": 1e-3,
            **training,
        },
        "backend": backend,
        "predictor": {"name": "secant", "window": 2},
        "schedule": {"observe": 3, "every": 1, "horizon": 2, "alpha": 2},
        "guards": {"max_drop": 1.0},
        "save_every": 2,
    }
    return make_config(block | changes)


def stored(out: Path, step: int) -> dict[str, Tensor]:
    """The weights of one of our checkpoints."""
    (file,) = (out / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")
    return load_file(file)


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
            children = psutil.Process(trainer.process._supervisor.pid).children()
            min(children, key=lambda child: child.create_time()).kill()  # it adopts others later

    return replaced("train", train)

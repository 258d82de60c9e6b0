"""What the config blocks of external trainers have in common: settings, and checks of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from next_core.errors import ConfigError, contradiction
from next_core.run_config import TrainingSettings
from next_core.settings import Settings


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()  # not resolved: a virtual environment's python is a link


FilePath = Annotated[Path, AfterValidator(_absolute)]


class RaySettings(Settings):
    """The local Ray that the trainer starts."""

    num_gpus: int | None = Field(None, ge=0, description="GPUs to declare; none: those that Ray finds")
    num_cpus: int | None = Field(None, ge=1, description="CPUs to declare; none: those that Ray finds")
    object_store_mib: int | None = Field(None, ge=80, description="Size of the object store; none: Ray's default")


def unsupported_setting(message: str) -> ConfigError:
    """Return the error for a setting that a trainer or its backend does not support."""
    return ConfigError(message, kind="backend-unsupported")


def chosen_estimator(training: TrainingSettings, config: Any, known: Mapping[str, Sequence[str]]) -> str:
    """Return the advantage estimator. Raises ``ConfigError`` for one that is not ``known`` of the algorithm."""
    allowed = known[training.algorithm]
    if config.estimator is not None and config.estimator not in allowed:
        raise contradiction(
            f"backend.estimator: {config.estimator} does not belong to training.algorithm: {training.algorithm}, which "
            f"takes {' or '.join(allowed)}"
        )
    return config.estimator or allowed[0]


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` up to ``most``: rollouts of a step in equal micro-batches."""
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)

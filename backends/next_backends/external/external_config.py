"""Settings that the config blocks of external trainers have in common."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from next_core.settings import Settings


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()  # not resolved: a virtual environment's python is a link


FilePath = Annotated[Path, AfterValidator(_absolute)]


class RaySettings(Settings):
    """The local Ray that the trainer starts."""

    num_gpus: int | None = Field(None, ge=0, description="GPUs to declare; none: those that Ray finds")
    num_cpus: int | None = Field(None, ge=1, description="CPUs to declare; none: those that Ray finds")
    object_store_mib: int | None = Field(None, ge=80, description="Size of the object store; none: Ray's default")

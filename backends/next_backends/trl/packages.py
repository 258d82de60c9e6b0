"""The packages of the extra ``trl``, imported when they are needed and not before."""

from __future__ import annotations

import importlib

from next_core.errors import BackendError


def require_packages() -> None:
    """Import what training with TRL needs. Raises ``BackendError`` naming the first package that is missing."""
    try:
        for package in ("transformers", "peft", "datasets", "trl"):
            importlib.import_module(package)
    except ImportError as error:
        raise BackendError(
            f"the backend 'trl' needs the package {error.name or error}: pip install next-core[trl]",
            kind="config-missing-package",
        ) from error

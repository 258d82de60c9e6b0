"""Packages that only some functions need, imported when those are called."""

import importlib
from typing import Any

from next_core.errors import ConfigError


def import_optional(package: str, extra: str) -> Any:
    """Import a package of one of our extras. Raises ``ConfigError`` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"this needs {package} ({error}): pip install 'next-core[{extra}]'", kind="config-missing-package"
        ) from None

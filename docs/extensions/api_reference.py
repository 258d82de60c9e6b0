"""Directives for the pages of the Python API: every public name, in the order of ``__all__``."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence

SHOWN: set[object] = set()
"""Classes already described in this build. A class that is public in two places is described once."""


def module(name: str, only: Sequence[str] = ()) -> str:
    """Return directives for the names in ``only``, else in ``__all__``, else for the module's own classes."""
    found = importlib.import_module(name)
    parts = []
    own = [key for key, value in vars(found).items() if getattr(value, "__module__", None) == name]
    for public in only or getattr(found, "__all__", own):
        value = getattr(found, public)
        if inspect.isclass(value):
            if value in SHOWN:
                continue
            SHOWN.add(value)
        kind = "autoclass" if inspect.isclass(value) else "autofunction" if callable(value) else "autodata"
        if kind == "autoclass" and issubclass(value, Exception):
            kind = "autoexception"
        parts.append(f"```{{eval-rst}}\n.. {kind}:: {name}.{public}\n```")
    return "\n\n".join(parts)


def plain(lines: list[str]) -> None:
    """Escape what reStructuredText would read as markup, outside code in backticks."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``[^`]*``|`[^`]*`)", line)
        kept = [part if part.startswith("`") else re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts]
        lines[index] = "".join(kept)

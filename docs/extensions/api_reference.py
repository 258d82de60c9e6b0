"""The pages of the Python API: every public name, in the order of the module's own list."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence

SHOWN: set[object] = set()
"""What a page of this build has described: a name that is public in two places is described in the first."""


def module(name: str, only: Sequence[str] = ()) -> str:
    """Return directives for all names in ``__all__`` (without one: the classes it defines), or for some names only."""
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
    """Our docstrings are text with code in backticks: what else reStructuredText would read into them is escaped."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``[^`]*``|`[^`]*`)", line)
        kept = [part if part.startswith("`") else re.sub(r"([|*]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts]
        lines[index] = "".join(kept)

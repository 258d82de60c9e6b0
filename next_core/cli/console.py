"""Where tables go: to standard error where standard output is JSON's, and wide where there is no terminal to ask."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDE = 130
"""Columns where there is no terminal."""


def make_console(*, as_json: bool) -> Console:
    """For a command with wide tables; text of plug-ins and paths is printed as it is."""
    stream = sys.stderr if as_json else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True, width=width)

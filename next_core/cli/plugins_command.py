"""``next-core plugins`` and ``next-core schema``."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from next_core.cli.options import Json

COLUMNS = ("kind", "name", "distribution", "version", "status")


def plugins(as_json: Json = False) -> None:
    """List every plug-in with its kind, name, distribution, version and status."""
    from next_core.plugins import registry

    entries = list(registry().entries())
    if as_json:
        print(json.dumps({"plugins": [{key: getattr(entry, key) for key in COLUMNS} for entry in entries]}))
        return
    table = Table(*COLUMNS, box=None, header_style="bold")
    for entry in entries:
        table.add_row(*(escape(getattr(entry, key)) for key in COLUMNS), style=None if entry.error is None else "red")
    Console().print(table)


def schema() -> None:
    """Print the JSON schema of the run config, with the settings of every installed plug-in."""
    from next_core.config import json_schema

    print(json.dumps(json_schema(), indent=2))

"""`next-core plugins` and `next-core schema`."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def plugins_command(as_json: bool) -> None:
    """List what is registered, broken plug-ins included."""
    from next_core.plugins import registry

    entries = list(registry().entries())
    table = Table("kind", "name", "distribution", "version", "status", box=None, header_style="bold")
    for entry in entries:
        style = None if entry.error is None else "red"
        cells = (entry.kind, entry.name, entry.distribution, entry.version, entry.status)
        table.add_row(*map(escape, cells), style=style)
    if as_json:
        keys = ("kind", "name", "distribution", "version", "status")
        print(json.dumps({"plugins": [{key: getattr(entry, key) for key in keys} for entry in entries]}))
    else:
        Console().print(table)


def schema_command() -> None:
    """The JSON schema of the run config."""
    from next_core.config import json_schema

    print(json.dumps(json_schema(), indent=2))

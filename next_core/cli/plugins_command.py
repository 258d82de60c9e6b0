"""``next-core plugins`` and ``next-core schema``."""

import json

from next_core.cli.console import Output
from next_core.cli.options import Json

COLUMNS = ("kind", "name", "distribution", "version", "status")


def plugins(as_json: Json = False) -> None:
    """List every plug-in with its kind, name, distribution, version and status."""
    from next_core.plugins import registry

    rows = [{key: getattr(entry, key) for key in COLUMNS} for entry in registry().entries()]
    output = Output(as_json)
    output.table("", rows, words=COLUMNS)
    output.json({"plugins": rows})


def schema() -> None:
    """Print the JSON schema of the run config, with the settings of every installed plug-in."""
    from next_core.config import json_schema

    print(json.dumps(json_schema(), indent=2))

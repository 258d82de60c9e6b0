"""The console script ``next-core``. Heavy imports wait until a command runs, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from next_core.errors import NextCoreError


def main() -> None:
    """Run the command. Print an error of ours as one message, and exit with its code."""
    from next_core.cli.app import app
    from next_core.errors import NextCoreError

    try:
        app()
    except NextCoreError as error:
        _fail(error)
    except OSError as error:  # from a library's reads and writes
        from next_core.storage.atomic import storage_error

        _fail(storage_error(error.filename or "the disk", error))


def _fail(error: NextCoreError) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)

"""The console script ``next-core``. Nothing heavy is imported until a command runs: ``--help`` answers at once."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: run the command, and turn our errors into one message and an exit code."""
    from next_core.cli.app import app
    from next_core.errors import NextCoreError

    try:
        app()
    except NextCoreError as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # of what a library wrote, or read
        from next_core.errors import StorageError
        from next_core.storage.atomic import storage_error

        print(storage_error(error.filename or "the disk", error), file=sys.stderr)
        sys.exit(StorageError.exit_code)

"""Where output goes, and what tables and progress bars look like."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 130
"""Columns to use when there is no terminal."""


def make_console(*, as_json: bool) -> Console:
    """Return a console that prints text as it is; with ``as_json`` standard output is left to the JSON object."""
    stream = sys.stderr if as_json else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True, width=width)


def make_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[str] = ()) -> Table:
    """Return a table. Columns whose heading is in ``text`` hold words and may wrap; the others hold numbers."""
    table = Table(title=title, header_style="bold", title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        if heading in text:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for row in rows:
        table.add_row(*row)
    return table


def shorten(lines: Sequence[str], most: int, what: str) -> list[str]:
    """Return at most ``most`` lines, and one that counts the rest."""
    rest = len(lines) - most
    return list(lines) if rest <= 0 else [*lines[:most], f"{what}: {rest} more; --json lists all"]


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on standard error for each thing that reports ``(what, done, total)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if not tasks:
            progress.start()  # not earlier: an immediate error then prints nothing but its own line
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()

"""What a command prints: text, tables, progress bars, and with ``--json`` one object for machines."""

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 130  # Columns to use when there is no terminal


class Output:
    """Standard output for people; with ``as_json`` it is left to the JSON object, and text goes to standard error."""

    def __init__(self, as_json: bool) -> None:
        stream = sys.stderr if as_json else sys.stdout
        width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True, width=width)

    def print(self, text: object = "") -> None:
        self.console.print(text)

    def list(self, lines: Sequence[str], most: int, what: str) -> None:
        """Print at most ``most`` lines, and one that counts the rest."""
        for line in lines[:most]:
            self.print(line)
        if len(lines) > most:
            self.print(f"{what}: {len(lines) - most} more; --json lists all")

    def table(self, title: str, rows: Iterable[Mapping[str, str]], words: Collection[str] = ()) -> None:
        """Print cells by heading. The first column and those in ``words`` hold words and may wrap, others numbers."""
        table = Table(title=title, header_style="bold", title_justify="left", box=None, pad_edge=False)
        for index, row in enumerate(rows):
            for heading in row if index == 0 else ():
                if not table.columns or heading in words:
                    table.add_column(heading, overflow="fold")
                else:
                    table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
            table.add_row(*row.values())
        self.print(table)

    def json(self, facts: Any) -> None:
        """Print the facts as one line of JSON if they were asked for."""
        if self.as_json:
            from next_core.storage.json_lines import json_text  # with the disk modules, for which --help need not wait

            print(json_text(facts))


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

"""What every stage is given and returns, and the registry of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from benchmarks.speed.machine import Rates

Row = dict[str, Any]
"""One measured thing: ``what``, ``cpu_s``, ``wall_s``, ``own_gib``, and where there are any ``target_cpu_s``,
``target_gib``, ``reference``, ``floor``, ``errors``; or ``what`` and ``skipped``, the reason."""


@dataclass(frozen=True)
class Options:
    """How to run a stage. ``toy``: tiny shapes in this process; ``full``: references whole, not on a sample."""

    rates: Rates
    toy: bool = False
    full: bool = False
    scratch: Path = Path(gettempdir())
    mergekit: str | None = None
    """The Python of an environment that has mergekit, to measure it on the same jump."""

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that is removed afterwards."""
        with TemporaryDirectory(prefix="next-core-speed-", dir=self.scratch) as folder:
            yield Path(folder)


@dataclass(frozen=True)
class Result:
    """A stage's setting in words and figures, its rows, and (scaling) its series."""

    setting: dict[str, Any]
    rows: list[Row]
    series: list[dict[str, Any]] | None = None


ORDER = (
    "compress-0.5B",
    "compress-1.5B",
    "compress-7B",
    "dense-top1",
    "next-mlp",
    "jump-1.5B",
    "write-adapter",
    "scaling",
)
"""How stages follow one another in ``all`` and in the tables, whichever module is imported first."""
Stage = Callable[[Options], Result]
STAGES: dict[str, Stage] = {}


def stage(name: str) -> Callable[[Stage], Stage]:
    """Register a stage under the name, one of ``ORDER``, that the command line and the result file have."""

    def register(function: Stage) -> Stage:
        STAGES[name] = function
        return function

    return register

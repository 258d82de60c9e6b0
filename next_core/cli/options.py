"""The options that every command on recorded checkpoints has, and what they open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from next_core.history.history import History
    from next_core.interfaces import CheckpointSource
    from next_core.types import Progress

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the plug-in, e.g. gate.window=25")
]
SetApplier = Annotated[
    list[str] | None,
    typer.Option("--set-applier", metavar="KEY=VALUE", help="A field of the applier, e.g. rank=16"),
]
Checkpoints = Annotated[
    list[Path],
    typer.Option(help="Folder of a run's checkpoints; or, given several times, the folders of the checkpoints"),
]
Predictor = Annotated[str, typer.Option(help="A predictor's name; see `next-core plugins`")]
Rank = Annotated[int, typer.Option(help="Rank k of the factors the predictor reads")]
Applier = Annotated[str, typer.Option(help="peft-adapter or merged-model")]
Backbone = Annotated[Path | None, typer.Option(help="The base model's folder")]
Layout = Annotated[str | None, typer.Option(help="Force a checkpoint layout by its source's name")]
SkipDamaged = Annotated[
    bool, typer.Option("--skip-damaged", help="Go on without checkpoints that are incomplete or damaged")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin files too (tensors only: nothing in them is run)")
]
Masters = Annotated[
    bool, typer.Option("--masters", help="fp32 masters from DeepSpeed's states; with --allow-pickle, can run code")
]
Compression = Annotated[str | None, typer.Option("--compressor", help="exact or lanczos; default: by what is stored")]
CacheFolder = Annotated[Path | None, typer.Option("--cache", help="Where decomposed deltas are kept for the next time")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep nothing")]
ExecutorName = Annotated[str, typer.Option("--executor", help="local, or ray (extra `ray`)")]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster's address, or auto; default: a Ray of its own on this machine")
]
Workers = Annotated[int, typer.Option(help="Processes at a time, one thread each")]


@dataclass(frozen=True)
class RunOptions:
    """Recorded checkpoints, as the command line names them."""

    checkpoints: list[Path]
    backbone: Path | None = None
    layout: str | None = None
    skip_damaged: bool = False
    allow_pickle: bool = False
    masters: bool = False
    compressor: str | None = None
    cache: Path | None = None
    no_cache: bool = False
    executor: str = "local"
    workers: int = 1
    address: str | None = None

    def __str__(self) -> str:
        return ", ".join(map(str, self.checkpoints))

    def source(self) -> CheckpointSource:
        """Open them. Raises ``CheckpointError`` for what is damaged, ``ConfigError`` for what contradicts."""
        from next_core.checkpoints import open_checkpoints
        from next_core.errors import ConfigError

        if self.no_cache and self.cache is not None:
            raise ConfigError("--cache and --no-cache contradict; leave one out")
        path = self.checkpoints[0] if len(self.checkpoints) == 1 else self.checkpoints
        return open_checkpoints(
            path,
            self.backbone,
            self.layout,
            skip_damaged=self.skip_damaged,
            allow_pickle=self.allow_pickle,
            masters=self.masters,
        )

    def history(
        self, source: CheckpointSource, rank: int, progress: Progress | None = None, *, spectrum: bool = False
    ) -> History:
        """What predictors and diagnostics read of it."""
        from pydantic import ValidationError

        from next_core.errors import ConfigError
        from next_core.history.delta_cache import DeltaCache, default_folder
        from next_core.history.executor import Executor
        from next_core.history.history import History
        from next_core.plugins import make_compressor, registry
        from next_core.settings import explain

        try:
            executor = Executor.model_validate(
                {"name": self.executor, "workers": self.workers, "address": self.address}
            )
        except ValidationError as error:
            raise ConfigError(explain(error, "executor", Executor)) from None
        version = registry().version("compressor", self.compressor) if self.compressor else ""
        cache = None if self.no_cache else DeltaCache(self.cache or default_folder(), compressor_version=version)
        compressor = None if self.compressor is None else make_compressor(self.compressor)
        return History(source, rank, compressor, progress, spectrum=spectrum, executor=executor, cache=cache)


def report(run: RunOptions, source: CheckpointSource, console: Console) -> dict[str, Any]:
    """Say what was found and what is odd about it; the same for ``--json``."""
    steps = source.steps
    span = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}" if steps else "no checkpoint"
    layout = f"{source.name} ({source.naming})" if source.naming else source.name
    console.print(f"{layout}: {span}; {len(source.parameters)} matrices")
    for note in source.notes:
        console.print(f"  note: {note}")
    return {
        "checkpoints": [str(path) for path in run.checkpoints],
        "layout": source.name,
        "naming": source.naming,
        "steps": list(steps),
        "notes": list(source.notes),
        "skipped": dict(source.skipped),
    }

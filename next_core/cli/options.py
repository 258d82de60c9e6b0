"""Options that several commands share. Each is declared once, in an alias or in a dataclass of options."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from next_core.errors import contradiction

if TYPE_CHECKING:
    from next_core.cli.console import Output
    from next_core.history.delta_cache import DeltaCache
    from next_core.history.history import History
    from next_core.interfaces import CheckpointSource
    from next_core.predictor import TrajectoryPredictor
    from next_core.types import Progress


def allow_local_modules(names: str | None) -> str | None:
    """Let ``module:Class`` name a module in the current folder, as ``python -m`` does."""
    if names is not None and ":" in names and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return names


Json = Annotated[bool, Option("--json", help="Print the result as one line of JSON on standard output")]
Checkpoints = Annotated[list[Path], Option(help="Folder of a run's checkpoints; repeat it to list them one by one")]
Backbone = Annotated[Path | None, Option(help="Folder of the base model")]
Predictor = Annotated[str, Option(callback=allow_local_modules, help="A name from `next-core plugins` or module:Class")]
Rank = Annotated[int, Option(help="Rank of the compressed deltas that the predictor reads")]


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """A predictor and an applier with their settings."""

    predictor: Predictor = "secant"
    rank: Rank = 1
    applier: Annotated[
        str | None, Option("--applier", "--as", help="peft-adapter, merged-model or verl; default: what the run stores")
    ] = None
    settings: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="A setting of the predictor: gate.window=25")
    ] = None
    applier_settings: Annotated[
        list[str] | None, Option("--set-applier", metavar="KEY=VALUE", help="A setting of the applier: rank=16")
    ] = None

    def make_predictor(self) -> TrajectoryPredictor:
        """Return the predictor. Raises ``PluginError`` for an unknown one, ``ConfigError`` for its settings."""
        from next_core.config import parse_assignments
        from next_core.plugins import make_predictor

        return make_predictor(self.predictor, **parse_assignments(self.settings or []))

    def applier_and_fields(self, source: CheckpointSource) -> tuple[str, dict[str, Any]]:
        """Return the name of the applier, which follows from the run unless it is given, and its settings, checked."""
        from next_core.config import parse_assignments
        from next_core.plugins import registry

        name, fields = self.applier or source.applier, parse_assignments(self.applier_settings or [])
        registry().make_config("applier", name, fields)
        return name, fields


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which recorded checkpoints to read, and how."""

    checkpoints: Checkpoints
    backbone: Backbone = None
    start: Annotated[Path | None, Option(help="Adapter that RL began from, if there is no checkpoint-0")] = None
    layout: Annotated[str | None, Option(help="Read this layout instead of detecting it")] = None
    skip_damaged: Annotated[bool, Option("--skip-damaged", help="Skip damaged checkpoints instead of failing")] = False
    allow_pickle: Annotated[bool, Option("--allow-pickle", help="Also read pickled tensors; run no code")] = False
    masters: Annotated[bool, Option("--masters", help="Read DeepSpeed's fp32 masters; .bin ones may run code")] = False

    def source(self) -> CheckpointSource:
        """Open the checkpoints. Raises ``CheckpointError`` for damaged ones."""
        from next_core.checkpoints import open_checkpoints

        folders = self.checkpoints[0] if len(self.checkpoints) == 1 else self.checkpoints
        flags = {name: getattr(self, name) for name in ("start", "skip_damaged", "allow_pickle", "masters")}
        return open_checkpoints(folders, self.backbone, self.layout, **flags)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where decomposed deltas are cached. Raises ``ConfigError`` when the two options contradict."""

    cache: Annotated[Path | None, Option(help="Cache decomposed deltas in this folder")] = None
    no_cache: Annotated[bool, Option("--no-cache", help="Cache nothing")] = False

    def __post_init__(self) -> None:
        if self.no_cache and self.cache is not None:
            raise contradiction("--cache and --no-cache contradict; omit one of them")

    def open_cache(self, compressor_version: str = "") -> DeltaCache | None:
        """Return the cache, or None with ``--no-cache`` or nowhere to put it."""
        from next_core.history.delta_cache import DeltaCache, default_folder

        folder = None if self.no_cache else self.cache or default_folder()
        return None if folder is None else DeltaCache(folder, compressor_version=compressor_version)


@dataclass(frozen=True, kw_only=True)
class RunOptions(CacheOptions, SourceOptions):
    """Recorded checkpoints, and how their deltas are decomposed."""

    compressor: Annotated[str | None, Option(help="exact or lanczos; default: exact for LoRA, else lanczos")] = None
    executor: Annotated[str, Option(help="local, or ray (extra `ray`)")] = "local"
    workers: Annotated[int, Option(help="Number of processes, one thread each")] = 1
    address: Annotated[str | None, Option(help="Address of a Ray cluster, or auto; default: a local Ray")] = None

    def history(
        self, source: CheckpointSource, rank: int, progress: Progress | None = None, *, spectrum: bool = False
    ) -> History:
        """Return the history that predictors and diagnostics read."""
        from next_core.history.executor import Executor
        from next_core.history.history import History
        from next_core.plugins import make_compressor, registry
        from next_core.settings import validated

        given = {"name": self.executor, "workers": self.workers, "address": self.address}
        executor = validated(Executor, given, "executor")
        name = self.compressor
        compressor = None if name is None else make_compressor(name)
        cache = self.open_cache("" if name is None else registry().version("compressor", name))
        return History(source, rank, compressor, progress, spectrum=spectrum, executor=executor, cache=cache)


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of ``command`` that is a dataclass of options by one option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
    own = [parameter for parameter in own if parameter.name not in groups]
    shared = [option for group in groups.values() for option in _parameters(group)]
    # What is required comes first, then the command's own options.
    shown = sorted([*shared, *own], key=lambda option: option.default is not option.empty)
    shown.sort(key=lambda option: option.default is not option.empty and option in shared)

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        made = {
            key: cls(**{field.name: values.pop(field.name) for field in fields(cls)}) for key, cls in groups.items()
        }
        command(**made, **values)

    expanded.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in shown])  # type: ignore[attr-defined]
    expanded.__annotations__ = {option.name: option.annotation for option in shown}
    return expanded


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        given = inspect.Parameter.empty if default is MISSING else default
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=hints[field.name])


def show_source(options: SourceOptions, source: CheckpointSource, output: Output) -> dict[str, Any]:
    """Print what was found and what is unusual about it. Return the same facts for ``--json``."""
    from next_core.interfaces.checkpoint_source import WARNING

    steps = source.steps
    count = f"{len(steps)} checkpoint{'s' * (len(steps) > 1)}"
    span = f"{count}, steps {steps[0]} to {steps[-1]}" if steps else "no checkpoint"
    layout = f"{source.name} ({source.naming})" if source.naming else source.name
    output.print(f"{layout}: {span}; {len(source.parameters)} matrices")
    for note in source.notes:
        output.print(f"  {note if note.startswith(WARNING) else f'note: {note}'}")
    return {
        "checkpoints": [str(path) for path in options.checkpoints],
        "layout": source.name,
        "naming": source.naming,
        "steps": list(steps),
        "notes": list(source.notes),
        "skipped": dict(source.skipped),
    }


def trouble(history: History) -> list[str]:
    """Return a note for a cache that could not be used."""
    return [] if history.cache_trouble is None else [history.cache_trouble]

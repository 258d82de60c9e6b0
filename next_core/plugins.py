"""The registry: every predictor, compressor, source, applier, reward and backend by name, with good errors."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pluggy
from pydantic import ValidationError

from next_core import hookspecs
from next_core.backend import Backend
from next_core.errors import ConfigError, PluginError, describe
from next_core.interfaces import CheckpointSource, Compressor, Reward, WeightApplier
from next_core.predictor import TrajectoryPredictor
from next_core.run_config import Choice
from next_core.settings import explain
from next_core.types import Plugin

Kind = Literal["predictor", "compressor", "source", "applier", "reward", "backend"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BASES: dict[Kind, type[Plugin]] = {
    "predictor": TrajectoryPredictor,
    "compressor": Compressor,
    "source": CheckpointSource,
    "applier": WeightApplier,
    "reward": Reward,
    "backend": Backend,
}


@dataclass
class Entry:
    """One registered name, or one plug-in that failed to load (``name`` is then its entry point's)."""

    kind: str
    name: str
    target: type[Plugin] | str | None
    distribution: str
    version: str
    error: str | None = None

    @property
    def status(self) -> str:
        return "ok" if self.error is None else f"broken: {self.error}"

    def load(self) -> type[Plugin]:
        """The class. Raises ``PluginError`` when it is broken or its lazy import fails."""
        if self.error is not None:
            raise PluginError(
                f"{self.kind} '{self.name}' of {self.distribution} {self.version} is broken: {self.error}"
            )
        if isinstance(self.target, str):
            try:
                self.target = import_object(self.target)
                self._check()
            except Exception as error:
                self.error = describe(error)
                raise PluginError(
                    f"{self.kind} '{self.name}' of {self.distribution} cannot be loaded: {self.error}"
                ) from error
        assert isinstance(self.target, type)
        return self.target

    def _check(self) -> None:
        base = BASES[self.kind]  # type: ignore[index]
        if not (isinstance(self.target, type) and issubclass(self.target, base)):
            raise TypeError(f"{self.target!r} is not a subclass of {base.__name__}")
        if not isinstance(getattr(self.target, "name", None), str):
            raise TypeError(f"{self.target.__name__} has no name")
        if inspect.isabstract(self.target):
            raise TypeError(
                f"{self.target.__name__} leaves abstract: {', '.join(sorted(self.target.__abstractmethods__))}"
            )


def import_object(reference: str) -> Any:
    """Import ``"module:attribute"``. Raises ``ConfigError`` when it is not of that form."""
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise ConfigError(f"'{reference}' is not of the form 'module:function'")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


class Registry:
    """Names to classes. A plug-in that fails to import is kept as a broken entry and disturbs no other."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._broken: list[Entry] = []
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def load_entry_points(self) -> None:
        """Load every plug-in installed under the entry-point group ``next_core``."""
        points = sorted(
            importlib.metadata.entry_points(group=hookspecs.PROJECT),
            # First-party names first, so that a stranger's clash shows on the stranger.
            key=lambda point: (point.dist is None or point.dist.name != "next-core", point.name),
        )
        for point in points:
            distribution = point.dist.name if point.dist else "unknown"
            version = point.dist.version if point.dist else "?"
            try:
                self.add_plugin(point.load(), distribution, version)
            except (Exception, SystemExit) as error:
                self._broken.append(Entry("plug-in", point.name, None, distribution, version, error=describe(error)))

    def add_plugin(self, plugin: object, distribution: str = "local", version: str = "") -> None:
        """Take what a plug-in's hooks register. Nothing is taken from a plug-in one of whose hooks fails."""
        collected: list[Entry] = []
        self._manager.register(plugin)
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        try:
            self._check_hooks(plugin)
            for kind in KINDS:
                caller = self._manager.subset_hook_caller(f"register_{kind}s", others)
                caller(register=self._collector(collected, kind, distribution, version))
        except Exception:
            self._manager.unregister(plugin)
            raise
        for entry in collected:
            self._add(entry)

    def _check_hooks(self, plugin: object) -> None:
        for caller in self._manager.get_hookcallers(plugin) or ():
            if not caller.has_spec():
                known = ", ".join(f"register_{kind}s" for kind in KINDS)
                raise PluginError(f"unknown hook '{caller.name}'; known: {known}")

    def add(self, cls: type[Plugin], distribution: str = "local", version: str = "") -> type[Plugin]:
        """Register one class of this program, without an entry point; usable as a decorator."""
        kind = next((kind for kind, base in BASES.items() if issubclass(cls, base)), None)
        if kind is None:
            raise PluginError(f"{cls.__name__} implements none of next_core's interfaces: {', '.join(KINDS)}")
        entry = Entry(kind, cls.name, cls, distribution, version)
        taken = self._entries.get((kind, cls.name))
        if taken is not None and taken.target is not cls:
            raise PluginError(f"{kind} '{cls.name}' is already provided by {taken.distribution}; choose another name")
        self._entries[kind, cls.name] = entry
        return cls

    def _collector(self, collected: list[Entry], kind: Kind, distribution: str, version: str) -> Callable[..., None]:
        def register(target: type[Plugin] | str, name: str | None = None) -> None:
            if isinstance(target, str) and name is None:
                raise PluginError(f"register('{target}') needs name=: the name it is to be used by")
            entry = Entry(kind, name or str(getattr(target, "name", None)), target, distribution, version)
            if not isinstance(target, str):
                entry._check()
            collected.append(entry)

        return register

    def _add(self, entry: Entry) -> None:
        key = entry.kind, entry.name
        taken = self._entries.get(key)
        if taken is None:
            self._entries[key] = entry
            return
        both = f"both {taken.distribution} and {entry.distribution} provide it; uninstall one"
        taken.error = taken.error or both
        self._broken.append(Entry(entry.kind, entry.name, None, entry.distribution, entry.version, error=both))

    def entries(self) -> Iterator[Entry]:
        """Everything known, broken plug-ins included, by kind and name."""
        order = {kind: index for index, kind in enumerate(KINDS)}
        every = [*self._entries.values(), *self._broken]
        yield from sorted(every, key=lambda entry: (order.get(entry.kind, len(order)), entry.name))  # type: ignore[call-overload]

    def version(self, kind: Kind, name: str) -> str:
        """The version of the distribution that registered a plug-in; empty for one that was not registered."""
        entry = self._entries.get((kind, name))
        return "" if entry is None else f"{entry.distribution} {entry.version}"

    def names(self, kind: Kind) -> list[str]:
        """The usable names of one kind."""
        return sorted(name for (k, name), entry in self._entries.items() if k == kind and entry.error is None)

    def get(self, kind: Kind, name: str) -> type[Any]:
        """The class registered as ``name``. Raises ``PluginError`` with the nearest match and the list."""
        entry = self._entries.get((kind, name))
        if entry is not None:
            return entry.load()
        for broken in self._broken:
            if broken.name == name:
                broken.load()
        near = difflib.get_close_matches(name, self.names(kind), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        known = ", ".join(f"{n} ({self._entries[kind, n].distribution})" for n in self.names(kind)) or "none"
        failed = "".join(f" Plug-in '{b.name}' of {b.distribution} did not load: {b.error}." for b in self._broken)
        raise PluginError(f"unknown {kind} '{name}'.{hint} Known: {known}.{failed}")

    def make_config(self, kind: Kind, name: str, fields: Mapping[str, Any], where: str | None = None) -> Any:
        """The validated config of one plug-in. Raises ``ConfigError`` naming each wrong key."""
        cls = self.get(kind, name)
        try:
            return cls.config_class.model_validate(dict(fields))
        except ValidationError as error:
            raise ConfigError(explain(error, where or f"{kind} '{name}'", cls.config_class)) from None

    def make(self, kind: Kind, name: str, /, **fields: Any) -> Any:
        """An instance of one plug-in with its validated config."""
        return self.get(kind, name)(self.make_config(kind, name, fields))


@functools.cache
def registry() -> Registry:
    """The process's registry, loaded from the installed entry points on first use."""
    made = Registry()
    made.load_entry_points()
    return made


def make_predictor(name: str, /, **fields: Any) -> TrajectoryPredictor:
    """A predictor by name: ``make_predictor("secant", window=10)``."""
    made: TrajectoryPredictor = registry().make("predictor", name, **fields)
    return made


def make_applier(name: str, /, **fields: Any) -> WeightApplier:
    """An applier by name: ``make_applier("peft-adapter", rank=16)``."""
    made: WeightApplier = registry().make("applier", name, **fields)
    return made


def make_compressor(name: str, /, **fields: Any) -> Compressor:
    """A compressor by name."""
    made: Compressor = registry().make("compressor", name, **fields)
    return made


def make_chosen(kind: Kind, choice: Choice) -> Any:
    """Return the plug-in that a config chose, with its validated settings."""
    return registry().make(kind, choice.name, **choice.fields)

"""The registry: every predictor, compressor, source, applier, reward and backend by name, with good errors."""

import copy
import difflib
import functools
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pluggy

from next_core import hookspecs
from next_core.backend import Backend
from next_core.errors import NextCoreError, PluginError, describe, invalid_value
from next_core.history.history import History
from next_core.interfaces import CheckpointSource, Compressor, Reward, WeightApplier
from next_core.predictor import Needs, Predictor, TrajectoryPredictor
from next_core.run_config import DEFAULT_PREDICTOR, Choice
from next_core.settings import Settings, validated
from next_core.step_predictor import StepPredictor
from next_core.types import Plugin

Kind = Literal["predictor", "compressor", "source", "applier", "reward", "backend"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BASES: dict[Kind, tuple[type[Plugin], ...]] = {
    "predictor": (TrajectoryPredictor, StepPredictor),
    "compressor": (Compressor,),
    "source": (CheckpointSource,),
    "applier": (WeightApplier,),
    "reward": (Reward,),
    "backend": (Backend,),
}
PredictorLike = str | Mapping[str, Any] | type[Predictor] | Predictor
"""Everything that ``resolve_any_predictor`` accepts."""
AUTO, STEP_SCALING, JUMPS = "auto", "step-scale", "adaptive-secant"
"""``auto`` means one of the other two; see ``steps_or_jumps``."""


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
        """Return the class, importing it on first use. Raises ``PluginError`` when it is broken."""
        if self.error is not None:
            raise PluginError(
                f"{self.kind} '{self.name}' of {self.distribution} {self.version} is broken: {self.error}",
                kind="plugin-broken",
            )
        if isinstance(self.target, str):
            try:
                self.target = check_class(self.kind, import_object(self.target))
            except (Exception, SystemExit) as error:
                self.error = _reason(error)
                raise PluginError(
                    f"{self.kind} '{self.name}' of {self.distribution} cannot be loaded: {self.error}",
                    kind="plugin-invalid" if isinstance(error, PluginError) else "plugin-broken",
                ) from error
        assert isinstance(self.target, type)
        return self.target


def check_class(kind: str, target: Any) -> type[Plugin]:
    """Return ``target`` if it is a complete class of this kind, else raise ``PluginError``."""
    bases, config = BASES[kind], getattr(target, "config_class", None)  # type: ignore[index]
    if not (isinstance(target, type) and issubclass(target, bases)):
        problem = f"{target!r} is not a subclass of {' or '.join(base.__name__ for base in bases)}"
    elif not isinstance(getattr(target, "name", None), str):
        problem = f"{target.__name__} has no name; set the class attribute `name`"
    elif not (isinstance(config, type) and issubclass(config, Settings)):
        problem = f"config_class of {target.__name__} is no subclass of next_core.Settings"
    elif unknown := set(getattr(target, "requires", ())) - set(get_args(Needs)):
        problem = f"requires of {target.__name__} has {sorted(unknown)}; known: {', '.join(get_args(Needs))}"
    elif inspect.isabstract(target):
        problem = f"{target.__name__} does not implement {', '.join(sorted(target.__abstractmethods__))}"
    else:
        return target
    raise PluginError(problem, kind="plugin-invalid")


def import_object(reference: str) -> Any:
    """Import ``"module:attribute"``. Raises ``ConfigError`` when it is not of that form or cannot be imported."""
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise invalid_value(f"'{reference}' is not of the form 'module:attribute'")
    try:
        return pkgutil.resolve_name(reference)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        hint = "; put its file next to the config, or its folder on PYTHONPATH" if absent else ""
        raise invalid_value(f"'{reference}' cannot be imported: {describe(error)}{hint}") from error


class Registry:
    """Names to classes. A plug-in that fails to import is kept as a broken entry and disturbs no other."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._broken: list[Entry] = []

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
                self._broken.append(Entry("plug-in", point.name, None, distribution, version, error=_reason(error)))

    def add_plugin(self, plugin: object, distribution: str = "local", version: str = "") -> None:
        """Take what a plug-in's hooks register. Nothing is taken from a plug-in one of whose hooks fails.

        Raises ``PluginError`` for one that registers nothing, or what is not complete.
        """
        manager = pluggy.PluginManager(hookspecs.PROJECT)  # its own, so that no other plug-in's hooks are called
        manager.add_hookspecs(hookspecs)
        manager.register(plugin)
        manager.check_pending()
        collected: list[Entry] = []

        def register(kind: Kind, target: type[Plugin] | str, name: str | None = None) -> None:
            if isinstance(target, str) and name is None:
                raise PluginError(f"register('{target}') needs name=, the plug-in's name", kind="plugin-invalid")
            found = target if isinstance(target, str) else check_class(kind, target)
            collected.append(Entry(kind, name or str(getattr(target, "name", None)), found, distribution, version))

        for kind in KINDS:
            getattr(manager.hook, f"register_{kind}s")(register=functools.partial(register, kind))
        if not collected:
            raise PluginError(
                "it registers nothing: put @hookimpl before def register_predictors(register), or another hook, and "
                "call register in it",
                kind="plugin-invalid",
            )
        for entry in collected:
            self._add(entry)

    def add(self, cls: type[Plugin]) -> type[Plugin]:
        """Register one class of this program, without an entry point; usable as a decorator.

        A class that is defined again, as when a notebook cell runs twice, replaces the earlier one.
        """
        kind = next((kind for kind, bases in BASES.items() if issubclass(cls, bases)), None)
        if kind is None:
            raise PluginError(
                f"{cls.__name__} implements none of next_core's interfaces: {', '.join(KINDS)}", kind="plugin-invalid"
            )
        check_class(kind, cls)
        taken = self._entries.get((kind, cls.name))
        if taken is not None and not _redefines(cls, taken.target):
            raise PluginError(
                f"{kind} '{cls.name}' is already provided by {taken.distribution}; choose another name",
                kind="plugin-name-taken",
            )
        self._entries[kind, cls.name] = Entry(kind, cls.name, cls, "local", "")
        return cls

    def _add(self, entry: Entry) -> None:
        key = entry.kind, entry.name
        taken = self._entries.get(key)
        if taken is None:
            self._entries[key] = entry
            return
        both = f"both {taken.distribution} and {entry.distribution} provide it; uninstall one"
        if taken.distribution == entry.distribution:
            both = f"{entry.distribution} registers it twice; register it once"
        taken.error = taken.error or both
        self._broken.append(Entry(entry.kind, entry.name, None, entry.distribution, entry.version, error=both))

    def entries(self) -> list[Entry]:
        """Everything known, broken plug-ins included, by kind and name."""
        order = (*KINDS, "plug-in")
        every = [*self._entries.values(), *self._broken]
        return sorted(every, key=lambda entry: (order.index(entry.kind), entry.name))

    def version(self, kind: Kind, name: str) -> str:
        """The version of the distribution that registered a plug-in; empty for one that was not registered."""
        entry = self._entries.get((kind, name))
        return "" if entry is None else f"{entry.distribution} {entry.version}"

    def names(self, kind: Kind) -> list[str]:
        """The usable names of one kind."""
        return sorted(name for (k, name), entry in self._entries.items() if k == kind and entry.error is None)

    def get(self, kind: Kind, name: str) -> type[Any]:
        """Return the class registered as ``name``, or the one that ``name`` refers to as ``module:Class``.

        Raises ``PluginError`` with the nearest registered name and the list of all.
        """
        entry = self._entries.get((kind, name))
        if entry is not None:
            return entry.load()
        if ":" in name:
            return Entry(kind, name, name, "this program", "").load()
        for broken in self._broken:
            if broken.name == name:
                broken.load()
        near = difflib.get_close_matches(name, self.names(kind), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        known = ", ".join(f"{n} ({self._entries[kind, n].distribution})" for n in self.names(kind)) or "none"
        failed = "".join(f" Plug-in '{b.name}' of {b.distribution} did not load: {b.error}." for b in self._broken)
        raise PluginError(f"unknown {kind} '{name}'.{hint} Known: {known}.{failed}", kind="plugin-unknown")

    def make_config(self, kind: Kind, name: str, fields: Mapping[str, Any], where: str | None = None) -> Any:
        """Return the validated config of one plug-in. Raises ``ConfigError`` naming each wrong key."""
        return validated(self.get(kind, name).config_class, fields, where or f"{kind} '{name}'")

    def make(self, kind: Kind, name: str, /, **fields: Any) -> Any:
        """Return an instance of one plug-in with its validated config."""
        return self.get(kind, name)(self.make_config(kind, name, fields))


def _redefines(cls: type[Plugin], earlier: type[Plugin] | str | None) -> bool:
    """Whether ``cls`` comes from the same place in the program as ``earlier``."""
    if not isinstance(earlier, type) or cls.__module__ != earlier.__module__:
        return False
    return cls.__module__ == "__main__" or cls.__qualname__ == earlier.__qualname__


def _reason(error: BaseException) -> str:
    if isinstance(error, pluggy.PluginValidationError):
        return " ".join(str(error).split())  # its first line does not say what is wrong
    return error.message if isinstance(error, NextCoreError) else describe(error)


@functools.cache
def registry() -> Registry:
    """The process's registry, loaded from the installed entry points on first use."""
    made = Registry()
    made.load_entry_points()
    return made


def trajectory_predictors() -> tuple[list[str], list[str]]:
    """Return the names of all predictors that read checkpoints, and notes on those that do not load.

    ``auto`` is left out: without a trainer it is another name of ``adaptive-secant``.
    """
    found: list[str] = []
    notes: list[str] = []
    for name in registry().names("predictor"):
        try:
            if name != AUTO and issubclass(registry().get("predictor", name), TrajectoryPredictor):
                found.append(name)
        except PluginError as error:
            notes.append(error.message)
    return found, notes


def make_predictor(name: str, /, **fields: Any) -> TrajectoryPredictor:
    """A predictor by name: ``make_predictor("secant", window=10)``."""
    return as_trajectory_predictor(registry().make("predictor", name, **fields))


def as_trajectory_predictor(predictor: Predictor) -> TrajectoryPredictor:
    """Return a predictor that reads checkpoints. Raises ``PluginError`` for one that scales a trainer's steps."""
    if not isinstance(predictor, TrajectoryPredictor):
        raise PluginError(
            f"predictor '{predictor.name}' scales the steps of a trainer while it trains, and cannot extrapolate "
            "checkpoints; choose one that jumps, such as 'adaptive-secant'",
            kind="predictor-needs-trainer",
        )
    return predictor


def make_applier(name: str, /, **fields: Any) -> WeightApplier:
    """An applier by name: ``make_applier("peft-adapter", rank=16)``."""
    made: WeightApplier = registry().make("applier", name, **fields)
    return made


def make_compressor(name: str, /, **fields: Any) -> Compressor:
    """A compressor by name."""
    made: Compressor = registry().make("compressor", name, **fields)
    return made


def steps_or_jumps(predictor: Any, backend: type[Backend]) -> Any:
    """Return what ``auto`` (a name, or a mapping with it) means in a run: step scaling where the backend can do it."""
    fields = dict(predictor) if isinstance(predictor, Mapping) else {"name": predictor}
    if fields.get("name") != AUTO:
        return predictor
    return fields | {"name": STEP_SCALING if backend.scales_steps else JUMPS}


def make_chosen(kind: Kind, choice: Choice) -> Any:
    """Return the plug-in that a config chose, with its validated settings."""
    return registry().make(kind, choice.name, **choice.fields)


def resolve_predictor(given: PredictorLike, /) -> Callable[[], TrajectoryPredictor]:
    """Return a function that makes a fresh predictor that reads checkpoints; see ``resolve_any_predictor``."""
    make = resolve_any_predictor(given)
    as_trajectory_predictor(make())
    return make  # type: ignore[return-value]


def resolve_any_predictor(given: PredictorLike, /) -> Callable[[], Predictor]:
    """Return a function that makes a fresh predictor, for callers that fit one predictor for each jump.

    ``given`` is a registered name, ``"module:Class"``, a mapping such as ``{"name": "secant", "window": 10}``, a class
    or an instance. An instance is copied for each use, so that no fit sees another; copies share the history that it
    was fitted on.

    Raises ``PluginError`` for anything else, ``ConfigError`` for wrong settings: at once, not at the first use.
    """
    if isinstance(given, Predictor):
        _copied(given)
        return functools.partial(_copied, given)
    fields = dict(given) if isinstance(given, Mapping) else {}
    chosen = fields.pop("name", DEFAULT_PREDICTOR) if isinstance(given, Mapping) else given
    cls: Any = registry().get("predictor", chosen) if isinstance(chosen, str) else check_class("predictor", chosen)
    return functools.partial(cls, validated(cls.config_class, fields, f"predictor '{cls.name}'"))


def _copied(predictor: Predictor) -> Predictor:
    """Copy deeply, but for the history, which may hold open files, and the display of progress."""
    shared = [value for key, value in vars(predictor).items() if key == "progress" or isinstance(value, History)]
    try:
        return copy.deepcopy(predictor, {id(value): value for value in shared})
    except Exception as error:
        message = f"predictor '{predictor.name}' cannot be copied: {describe(error)}; pass its class or name"
        raise PluginError(message, kind="plugin-invalid") from error

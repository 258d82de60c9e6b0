"""Plug-ins are found by name; a broken one says so and disturbs no other."""

import importlib
import importlib.metadata
import json
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

from next_core import plugins
from next_core.history.history import History
from next_core.hookspecs import Register, hookimpl
from next_core.plugins import Registry, resolve_predictor
from next_core.predictor import Abstain, PerMatrixPredictor
from next_core.settings import Settings
from tests.errors import raises_kind

PREDICTOR = """
from next_core.hookspecs import hookimpl
from next_core.predictor import Abstain, PerMatrixPredictor

class Mine(PerMatrixPredictor):
    name = "{name}"
    def predict_matrix(self, matrix, horizon):
        return Abstain("never")

@hookimpl
def register_predictors(register):
    register(Mine)
"""


HOOK = "from next_core.hookspecs import hookimpl\n@hookimpl\ndef register_predictors(register):\n"


class GreedyConfig(Settings):
    window: int = Field(3, ge=1)


class Greedy(PerMatrixPredictor):
    name = "greedy"
    config_class = GreedyConfig

    def predict_matrix(self, matrix: Any, horizon: int) -> Abstain:
        return Abstain("never")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``install("their-dist", "their_module", source)``: a distribution with one entry point, on ``sys.path``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)

    def make(distribution: str, module: str, source: str, entry: str | None = None) -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[next_core]\n{entry or module} = {module}\n")
        importlib.invalidate_caches()

    yield make
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Registry]]:
    """The process's registry, loaded anew."""

    def fresh() -> Registry:
        plugins.registry.cache_clear()
        return plugins.registry()

    yield fresh
    plugins.registry.cache_clear()


def broken(registry: Registry, name: str) -> plugins.Entry:
    [entry] = [entry for entry in registry.entries() if entry.name == name and entry.error is not None]
    return entry


def test_an_installed_distribution_adds_its_predictor_by_name_and_an_unknown_name_lists_all(
    install: Callable[..., None], load: Callable[[], Registry]
) -> None:
    install("their-dist", "their_module", PREDICTOR.format(name="theirs"))
    registry = load()
    assert plugins.make_predictor("theirs").name == "theirs"
    [entry] = [entry for entry in registry.entries() if entry.name == "theirs"]
    assert (entry.kind, entry.distribution, entry.version, entry.status) == ("predictor", "their-dist", "1.2", "ok")
    with raises_kind("plugin-unknown", "'secnat'", "'secant'", "secant (next-core)", "theirs (their-dist)"):
        registry.get("predictor", "secnat")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise OSError('no such library')", "OSError: no such library"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError: "),
        (
            PREDICTOR.format(name="half") + "\n@hookimpl\ndef register_sources(register):\n    1 / 0",
            "ZeroDivisionError",
        ),
        (HOOK + "    register(dict)", "<class 'dict'>"),
        (HOOK + "    register('their_module:Mine')", "'their_module:Mine'"),
        (HOOK.replace("(register)", "(registry)") + "    pass", "registry"),
        (HOOK.replace("@hookimpl", "") + "    pass", "@hookimpl"),
        (PREDICTOR.format(name="half").replace("    def pred", "    requires = 'gram'\n    def pred"), "target, gram"),
        (PREDICTOR.format(name="half").replace("    def pred", "    config_class = dict\n    def pred"), "Settings"),
        (HOOK.replace("_predictors(", "_predictor(") + "    pass", "'register_predictor'"),
        (
            "from next_core.predictor import TrajectoryPredictor\n"
            "class Half(TrajectoryPredictor):\n    name = 'half'\n" + HOOK + "    register(Half)",
            "Half does not implement predict",
        ),
    ],
)
def test_a_broken_plugin_is_listed_with_its_error_and_breaks_no_other(
    install: Callable[..., None], load: Callable[[], Registry], source: str, error: str
) -> None:
    install("bad-dist", "bad_module", source, entry="bad")
    install("their-dist", "their_module", PREDICTOR.format(name="theirs"))
    registry = load()
    entry = broken(registry, "bad")
    assert (entry.kind, entry.distribution, entry.version) == ("plug-in", "bad-dist", "1.2")
    assert error in (entry.error or "")
    assert entry.status.startswith("broken: ")
    assert {"secant", "theirs"} <= set(registry.names("predictor"))
    with raises_kind("plugin-broken", error):
        registry.get("predictor", "bad")
    with raises_kind("plugin-unknown", "'bad' of bad-dist"):
        registry.get("predictor", "half")


def test_a_name_claimed_twice_names_both_distributions_and_can_be_used_by_neither(
    install: Callable[..., None], load: Callable[[], Registry]
) -> None:
    install("a-dist", "a_module", PREDICTOR.format(name="same"))
    install("b-dist", "b_module", PREDICTOR.format(name="same"))
    registry = load()
    assert "same" not in registry.names("predictor")
    assert [(e.distribution, e.error) for e in registry.entries() if e.name == "same"] == [
        ("a-dist", "both a-dist and b-dist provide it; uninstall one"),
        ("b-dist", "both a-dist and b-dist provide it; uninstall one"),
    ]
    with raises_kind("plugin-broken", "a-dist", "b-dist"):
        plugins.make_predictor("same")
    registry.add_plugin(
        types.SimpleNamespace(register_predictors=hookimpl(lambda register: (register(Greedy), register(Greedy))))
    )
    with raises_kind("plugin-broken", "local", "twice"):
        registry.get("predictor", "greedy")
    assert plugins.make_predictor("secant").name == "secant"


@pytest.mark.parametrize(
    ("target", "kind", "error"),
    [
        ("a_package_nobody_has:Thing", "plugin-broken", "a_package_nobody_has"),
        ("json:JSONDecoder", "plugin-invalid", "CheckpointSource"),
        ("json", "plugin-broken", "'json'"),
    ],
)
def test_a_lazy_registration_fails_when_it_is_named_and_disturbs_nothing_until_then(
    install: Callable[..., None], load: Callable[[], Registry], lora_run: Any, target: str, kind: str, error: str
) -> None:
    source = f"""
    from next_core.hookspecs import hookimpl

    @hookimpl
    def register_sources(register):
        register("{target}", name="a-lazy")  # sorts before the layouts that exist
    """
    install("lazy-dist", "lazy_module", source)
    registry = load()
    assert "a-lazy" in registry.names("source")
    with raises_kind(kind, "source 'a-lazy' of lazy-dist", error):
        registry.get("source", "a-lazy")
    assert "a-lazy" not in registry.names("source")
    from next_core import open_checkpoints

    assert open_checkpoints(lora_run.path).name == "peft-adapter"


def test_a_layout_whose_detection_fails_does_not_keep_other_folders_from_being_opened(
    install: Callable[..., None], load: Callable[[], Registry], lora_run: Any
) -> None:
    source = """
    from next_core.hookspecs import hookimpl
    from next_core.sources.full_model import FullModelSource

    class Bad(FullModelSource):
        name = "a-bad"

        @classmethod
        def detect(cls, path):
            raise ValueError("surprise")

    @hookimpl
    def register_sources(register):
        register(Bad)
    """
    install("bad-dist", "bad_module", source)
    load()
    from next_core import open_checkpoints

    assert open_checkpoints(lora_run.path).name == "peft-adapter"


def test_a_class_of_this_program_is_registered_by_decorating_it() -> None:
    registry = Registry()
    assert registry.add(Greedy) is Greedy
    assert registry.make("predictor", "greedy", window=7).config.window == 7
    [entry] = registry.entries()
    assert (entry.kind, entry.name, entry.distribution, entry.status) == ("predictor", "greedy", "local", "ok")


@pytest.mark.parametrize(("module", "qualname"), [("__main__", "Greedy"), ("__main__", "Renamed"), ("mine", "Greedy")])
def test_a_class_that_is_defined_again_replaces_the_earlier_one(module: str, qualname: str) -> None:
    registry = Registry()
    registry.add(type("Greedy", (Greedy,), {"__module__": module, "__qualname__": "Greedy"}))
    again = registry.add(type("Greedy", (Greedy,), {"__module__": module, "__qualname__": qualname}))
    assert registry.get("predictor", "greedy") is again


def test_a_class_of_this_program_cannot_take_a_name_or_lack_an_interface() -> None:
    registry = Registry()
    registry.add(Greedy)
    with raises_kind("plugin-name-taken", "'greedy'", "local"):
        registry.add(type("Other", (Greedy,), {}))
    with raises_kind("plugin-invalid", "dict", "predictor, compressor"):
        registry.add(dict)


def test_a_plugin_given_as_an_object_is_taken_without_an_entry_point() -> None:
    class Here:
        @hookimpl
        def register_predictors(self, register: Register) -> None:
            register(Greedy)

    registry = Registry()
    registry.add_plugin(Here(), "notebook", "0")
    assert registry.get("predictor", "greedy") is Greedy


@pytest.mark.parametrize("field", ["windw", "name", "kind", "self"])
def test_an_unknown_field_is_a_config_error_whatever_it_is_called(field: str) -> None:
    registry = Registry()
    registry.add(Greedy)
    with raises_kind("config-unknown-key", f"predictor 'greedy'.{field}", "window"):
        registry.make("predictor", "greedy", **{field: 1})


def test_plugins_are_listed_for_people_and_as_json_with_broken_ones_among_them(
    install: Callable[..., None], load: Callable[[], Registry], cli: Callable[..., Any]
) -> None:
    install("bad-dist", "bad_module", "raise ValueError('a [bold] claim, see [/url]')", entry="bad")
    load()
    outcome = cli("plugins", "--json")
    assert outcome.code == 0
    listed = json.loads(outcome.out.splitlines()[-1])["plugins"]
    assert all(set(entry) == {"kind", "name", "distribution", "version", "status"} for entry in listed)
    found = {(entry["kind"], entry["name"]): entry for entry in listed}
    assert found["predictor", "secant"]["distribution"] == "next-core"
    assert found["predictor", "secant"]["version"] == importlib.metadata.version("next-core")
    assert found["predictor", "secant"]["status"] == "ok"
    assert found["plug-in", "bad"]["status"] == "broken: ValueError: a [bold] claim, see [/url]"
    shown = cli("plugins")
    assert shown.code == 0
    assert "secant" in shown.out
    assert "[bold]" in shown.out


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's own, with predictors that nobody registered."""
    module = ModuleType("mine")
    module.Greedy, module.Inner = Greedy, type("Inner", (), {"Greedy": Greedy})
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


@pytest.mark.parametrize(
    "given",
    [{"name": "mine:Greedy", "window": 4}, Greedy(GreedyConfig(window=4)), Greedy, "mine:Greedy"],
    ids=["mapping", "instance", "class", "name"],
)
def test_a_predictor_is_made_anew_each_time_with_its_settings(mine: ModuleType, given: Any) -> None:
    wanted = GreedyConfig() if given in (Greedy, "mine:Greedy") else GreedyConfig(window=4)
    one, other = (make := resolve_predictor(given))(), make()
    assert one is not other
    assert one is not given
    assert one.config == other.config == wanted


def test_a_fit_of_a_given_instance_does_not_reach_the_next_copy(lora_run: Any) -> None:
    from next_core import open_checkpoints

    history = History(open_checkpoints(lora_run.path))
    given = plugins.make_predictor("secant")
    make = resolve_predictor(given.fit(history))
    assert make().predict(10).source is history.source  # the history is not copied
    make().fit(History(open_checkpoints(lora_run.path)))
    assert make().predict(10).source is history.source


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (5, "5 is not a subclass"),
        (dict, "<class 'dict'>"),
        (PerMatrixPredictor, "PerMatrixPredictor has no name"),
        ({"name": 5}, "5 is not a subclass"),
    ],
)
def test_what_makes_no_predictor_is_refused_at_once(given: Any, reason: str) -> None:
    with raises_kind("plugin-invalid", reason):
        resolve_predictor(given)


def test_an_instance_that_cannot_be_copied_is_refused() -> None:
    given = Greedy()
    given.lock = threading.Lock()
    with raises_kind("plugin-invalid", "TypeError"):
        resolve_predictor(given)

"""The checks of every kind of plug-in: a name, and settings that are validated once and never change."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from next_core.settings import Settings
from next_core.testing.check_runner import CheckedKind, CheckSet, expect
from next_core.types import Plugin


def check_set(kind: CheckedKind, base: type[Plugin], as_case: Callable[[Any], Any] = lambda case: case) -> CheckSet:
    """Return the checks of one kind, starting with those of every plug-in. Its cases have the plug-in as ``plugin``."""
    checks = CheckSet(kind, base, as_case)
    for check in (has_a_name, settings_survive_a_round_trip, settings_are_strict):
        checks.add(check)
    return checks


def has_a_name(case: Any) -> None:
    """The class has the `name` by which a config selects it."""
    name = getattr(type(case.plugin), "name", None)
    wanted = "a class attribute `name`: text without spaces or ':'"
    expect(isinstance(name, str) and bool(name) and not set(name) & set(" \t\n:"), wanted, repr(name))


def settings_survive_a_round_trip(case: Any) -> None:
    """Settings written to a run's config.yaml are read back unchanged, and `next-core schema` describes them all."""
    config = case.plugin.config
    for what, written in (
        ("model_dump()", config.model_dump()),
        ("model_dump(mode='json')", json.loads(json.dumps(config.model_dump(mode="json")))),
    ):
        again = type(config).model_validate(written)
        expect(again == config, f"the output of {what} validates to {config!r}", repr(again))
    described = set(type(config).model_json_schema().get("properties", {}))
    fields = set(type(config).model_fields)
    expect(described == fields, f"a JSON schema of {sorted(fields)}", sorted(described))


def settings_are_strict(case: Any) -> None:
    """Settings are a `Settings`: immutable, and unknown keys and numbers that are not finite are errors."""
    config, wanted = case.plugin.config, type(case.plugin).config_class
    expect(issubclass(wanted, Settings), "config_class derives from Settings", wanted)
    expect(isinstance(config, wanted), f"config is a {wanted.__name__}", repr(config))
    for key, value in Settings.model_config.items():
        expect(config.model_config.get(key) == value, f"model_config has {key}={value!r}", config.model_config)
    try:
        type(config).model_validate(config.model_dump() | {"no_such_setting": 1})
    except ValidationError:
        return
    expect(False, "an unknown key is an error", "the key 'no_such_setting' was accepted")

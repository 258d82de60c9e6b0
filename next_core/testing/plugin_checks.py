"""What every plug-in promises, whatever its kind: a name, and settings that are validated once and for all."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from next_core.settings import Settings
from next_core.testing.check_runner import CheckedKind, expect, register
from next_core.types import Plugin


def register_common(kind: CheckedKind, as_case: Any) -> None:
    """Make these checks those of one kind; its cases have the plug-in as ``plugin``."""
    for check in (
        has_a_name,
        settings_survive_a_round_trip,
        settings_are_frozen,
        settings_refuse_what_they_do_not_know,
        settings_have_a_json_schema,
    ):
        register(kind, as_case)(check)


def _class(case: Any) -> type[Plugin]:
    cls: type[Plugin] = type(case.plugin)
    return cls


def has_a_name(case: Any) -> None:
    """The class carries the name by which a config chooses it."""
    name = getattr(_class(case), "name", None)
    wanted = "a class attribute `name`: text without spaces or ':', which a config can name"
    expect(isinstance(name, str) and bool(name) and not set(name) & set(" \t\n:"), wanted, repr(name))


def settings_survive_a_round_trip(case: Any) -> None:
    """Settings written out, as a run's config.yaml has them, are read back as they were."""
    config = case.plugin.config
    expect(isinstance(config, _class(case).config_class), "config is an instance of config_class", repr(config))
    expect(issubclass(_class(case).config_class, Settings), "config_class derives from Settings", "it does not")
    for how, written in (
        ("model_dump()", config.model_dump()),
        ("model_dump(mode='json')", json.loads(json.dumps(config.model_dump(mode="json")))),
    ):
        again = type(config).model_validate(written)
        expect(again == config, f"what {how} gives validates to {config!r}", repr(again))


def settings_are_frozen(case: Any) -> None:
    """Settings cannot be changed once they were validated."""
    config = case.plugin.config
    for field in type(config).model_fields:
        try:
            setattr(config, field, getattr(config, field))
        except ValidationError:
            continue
        expect(False, f"setting `{field}` of a made config is refused (frozen=True)", "it was accepted")
    expect(bool(config.model_config.get("frozen")), "model_config has frozen=True", repr(config.model_config))


def settings_refuse_what_they_do_not_know(case: Any) -> None:
    """A key that is no setting is an error, and so is a number that is not finite."""
    config = case.plugin.config
    try:
        type(config).model_validate(config.model_dump() | {"no_such_setting": 1})
    except ValidationError:
        pass
    else:
        expect(False, "an unknown key is refused (extra='forbid')", "the key 'no_such_setting' was accepted")
    finite = config.model_config.get("allow_inf_nan") is False
    expect(finite, "model_config has allow_inf_nan=False, as Settings has it", repr(config.model_config))


def settings_have_a_json_schema(case: Any) -> None:
    """`next-core schema` can describe the settings."""
    schema = type(case.plugin.config).model_json_schema()
    json.dumps(schema)
    fields = set(type(case.plugin.config).model_fields)
    expect(
        fields == set(schema.get("properties", {})),
        f"a schema of {sorted(fields)}",
        sorted(schema.get("properties", {})),
    )

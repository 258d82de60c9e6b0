"""The base class of every settings model, and pydantic's errors as messages about a config file."""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from next_core.errors import ConfigError

KINDS = {"extra_forbidden": "config-unknown-key", "value_error": "config-contradiction"}
"""Kinds of error by pydantic's type; our own validators (``value_error``) compare several settings."""


class Settings(BaseModel):
    """Immutable settings; an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """Return the settings of a mapping. Raises ``ConfigError`` with one line for each wrong key."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise config_error(error, where, model) from None


def config_error(error: ValidationError, where: str, known: type[BaseModel]) -> ConfigError:
    """Return pydantic's error as ours, with one line for each wrong key; its kind is that of the first line."""
    kind = KINDS.get(error.errors()[0]["type"], "config-invalid-value")
    return ConfigError(explain(error, where, known), kind=kind)


def explain(error: ValidationError, where: str, known: type[BaseModel]) -> str:
    """Return one line for each wrong key, with the nearest key of the block it stands in."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            keys = _known_keys(known, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            options = f" Known keys: {', '.join(keys)}." if keys else ""
            message = f"unknown key{hint or '.'}{options}"
        elif item["type"] != "missing" and not isinstance(item.get("input"), dict):
            message = f"{message} (got {reprlib.repr(item.get('input'))})"  # bounded: YAML's aliases can nest
        lines.append(f"{where}{'.' + key if key else ''}: {message}")
    return "\n".join(lines)


def _known_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the block at ``location``, walking through optional and listed blocks."""
    for part in location:
        field = model.model_fields.get(str(part))
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        model = next((option for option in options if hasattr(option, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)

"""The reference of every config key, generated from the pydantic models."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from next_core.comparison.comparison_config import CompareConfig
from next_core.plugins import KINDS, registry
from next_core.run_config import Choice, RunConfig

HEADINGS = {
    "predictor": "Predictors: the block `predictor`",
    "backend": "Backends: the block `backend`",
    "compressor": "Compressors: the block `compressor`",
    "reward": "Rewards: the block `training.reward`",
    "applier": "Appliers: `--applier` and `--set-applier`",
    "source": "Sources: `open_checkpoints`, `--layout`",
}
COLUMNS = ("key", "type", "default", "bounds", "meaning")
BOUNDS = ((annotated_types.Ge, "ge", "≥"), (annotated_types.Gt, "gt", ">"), (annotated_types.Le, "le", "≤"))
BOUNDS += ((annotated_types.Lt, "lt", "<"),)


def run_config() -> str:
    """Return the run config, a section for each block."""
    return "\n\n".join(_model(RunConfig, "", 3))


def comparison_config() -> str:
    """Return the keys of a comparison's file."""
    return table(CompareConfig)


def plugins() -> str:
    """Return a section for each installed plug-in, by kind, with a table of its settings."""
    parts = []
    for kind in KINDS:
        entries = [entry for entry in registry().entries() if entry.kind == kind and entry.error is None]
        parts.append(f"## {HEADINGS[kind]}")
        for entry in entries:
            cls = registry().get(kind, entry.name)
            origin = "" if entry.distribution == "next-core" else f" (from {entry.distribution} {entry.version})"
            parts += [f"### {kind}: {entry.name}{origin}", first_paragraph(cls)]
            parts += _model(cls.config_class, "", 4) if cls.config_class.model_fields else ["No settings."]
            recommended = getattr(cls, "recommended", {})
            if recommended:
                parts.append(f"Recommended, and used where the config omits them: `{json.dumps(recommended)}`.")
    return "\n\n".join(parts)


def _model(model: type[BaseModel], prefix: str, level: int) -> list[str]:
    """Return the table of a block, then those of the blocks inside it."""
    parts = [table(model, prefix)]
    for name, field in model.model_fields.items():
        inner = block_of(field.annotation)
        if inner is not None:
            key = f"{prefix}{name}"
            parts += [f"{'#' * level} `{key}`", first_paragraph(inner), *_model(inner, f"{key}.", level)]
    return parts


def table(model: type[BaseModel], prefix: str = "") -> str:
    """Return one row per key: name, type, default, bounds, description."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, field in model.model_fields.items():
        cells = (type_of(field.annotation), default_of(field), bounds_of(field), meaning_of(field))
        rows.append((f"`{prefix}{name}`", *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def block_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that is a block of known keys or ``null``; None for other fields."""
    for option in (annotation, *get_args(annotation)):
        if inspect.isclass(option) and issubclass(option, BaseModel) and option is not Choice:
            return option
    return None


def type_of(annotation: Any) -> str:
    """Return a type in the words of a config's author."""
    return " or ".join(dict.fromkeys(_words(annotation)))


def _words(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _words(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in sorted(arguments, key=lambda option: option is type(None)):
            yield from _words(argument)
    elif origin is Literal:
        yield ", ".join(f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in arguments)
    elif origin in (list, tuple):
        yield f"list of {type_of(arguments[0])}" if arguments else "list"
    elif origin is dict or annotation is dict:
        yield "mapping"
    elif inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield "name or block" if annotation is Choice else "block"
    else:
        plain = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", Path: "path"}
        yield {**plain, type(None): "`null`", Any: "anything"}.get(annotation, getattr(annotation, "__name__", "?"))


def default_of(field: FieldInfo) -> str:
    """Return the default as YAML writes it; the defaults of a block are in its own table."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Choice):
        return f"`{value.name}`"
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, str | Path):
        return f"`{value}`"
    return f"`{escape(json.dumps(value, default=str))}`"


def bounds_of(field: FieldInfo) -> str:
    """Return bounds such as ``≥ 1`` or ``> 0, ≤ 1``."""
    found = [
        f"{sign} {getattr(mark, name):g}"
        for mark in field.metadata
        for kind, name, sign in BOUNDS
        if isinstance(mark, kind)
    ]
    return ", ".join(found)


def meaning_of(field: FieldInfo) -> str:
    """Return the field's description, or the docstring of its block."""
    block = block_of(field.annotation)
    return escape(field.description) if field.description else "" if block is None else first_paragraph(block)


def first_paragraph(cls: type) -> str:
    """Return the first paragraph of a class's own docstring."""
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    return escape(" ".join(text.replace("``", "`").split()))


def escape(text: str) -> str:
    """Escape a text for a cell of a Markdown table, outside code in backticks."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<])", r"\\\1", part) for part in parts)

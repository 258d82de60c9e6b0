"""The reference of the command line, generated from the typer application."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import typer

from docs.extensions.config_reference import escape
from next_core import errors
from next_core.cli.app import app

KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def commands() -> str:
    """Return a section for each command: its purpose, arguments and options."""
    parts = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts += [f"## next-core {name}", escape(" ".join(command.help.split())), _usage(name, command)]
        if command.params:
            rows = [("argument or option", "value", "default", "meaning"), ("---",) * 4, *map(_row, command.params)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def exit_codes() -> str:
    """Return a table of code, error and meaning for each error class and signal."""
    classes = [errors.NextCoreError, *errors.NextCoreError.__subclasses__()]
    rows = {cls.exit_code: (f"`{cls.__name__}`", _first_line(cls)) for cls in classes if "exit_code" in vars(cls)}
    rows[0] = "", "Done."
    rows[1] = rows[1][0], "Any other error."
    for number in (signal.SIGINT, signal.SIGTERM):
        ended = errors.Interrupted("", number)
        rows[ended.exit_code] = f"`{type(ended).__name__}`", f"{_first_line(type(ended))} ({number.name})"
    lines = ["| code | error | meaning |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {code} | {name} | {escape(meaning)} |" for code, (name, meaning) in sorted(rows.items()))]
    )


def _usage(name: str, command: Any) -> str:
    arguments = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in command.params if not _is_option(p)]
    required = [f"{_longest(p)} {_value(p)}" for p in command.params if _is_option(p) and p.required]
    return f"`{' '.join(['next-core', name, *arguments, *required, '[OPTIONS]'])}`"


def _row(parameter: Any) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if not _is_option(parameter):
        names = f"`{parameter.name.upper()}`"
    value = "" if getattr(parameter, "is_flag", False) else f"`{escape(_value(parameter))}`"
    if parameter.min is not None:
        value += f" ≥ {parameter.min:g}"
    many = "; can be repeated" if getattr(parameter, "multiple", False) else ""
    return names, value, _default(parameter), escape(parameter.help) + many


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    if parameter.default in (None, False, []):
        return ""
    if parameter.default is True:
        return f"`{parameter.opts[0]}`"
    return f"`{parameter.default}`"


def _value(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    return next(KINDS[kind] for kind in _types(parameter.type_descriptor.annotation) if kind in KINDS)


def _types(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType, list):
        for argument in get_args(annotation):
            yield from _types(argument)
    else:
        yield annotation


def _is_option(parameter: Any) -> bool:
    return any(name.startswith("-") for name in parameter.opts)


def _longest(parameter: Any) -> str:
    return str(max(parameter.opts, key=len))


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").splitlines()[0]

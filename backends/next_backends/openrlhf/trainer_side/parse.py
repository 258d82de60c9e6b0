"""What OpenRLHF's own parser makes of a command line; starts neither Ray nor a model.

``parse.py OPTION...`` prints one JSON line, ``parse.py --record FILE`` writes down the options that the parser knows.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

ANSWER = "openrlhf parser: "
PACKAGES = ("torch", "vllm", "deepspeed", "ray", "transformers", "peft")
FLAGS = {"_StoreTrueAction": "store_true", "_StoreFalseAction": "store_false"}


class Found(BaseException):
    """Ends the command line where its work would begin, with what was looked for."""

    def __init__(self, value: Any) -> None:
        self.value = value


class RefusedError(Exception):
    """What the parser says of a command line."""


def found(value: Any, *_: Any) -> NoReturn:
    raise Found(value)


def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
    raise RefusedError(message)


def run_cli(arguments: list[str]) -> Any:
    """OpenRLHF's CLI up to the first call that it is told to end at."""
    sys.argv = ["train_ppo_ray", *arguments]
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    except Found as end:
        return end.value
    raise RuntimeError("the command line ended before it made a strategy")


def resolve(arguments: list[str]) -> dict[str, Any]:
    """The arguments after OpenRLHF's own checks: its training begins with a look at Ray, then makes a strategy."""
    with (
        mock.patch("ray.is_initialized", return_value=True),
        mock.patch("openrlhf.utils.get_strategy", found),
        mock.patch("argparse.ArgumentParser.error", refuse),
    ):
        resolved: dict[str, Any] = plain(run_cli(arguments))
    return resolved


def plain(value: Any) -> Any:
    return {key: plain(item) for key, item in vars(value).items()} if isinstance(value, SimpleNamespace) else value


def record() -> dict[str, dict[str, Any]]:
    """Each option's type, number of values and choices, or that it is a flag."""
    with mock.patch("argparse.ArgumentParser.parse_args", found):
        parser = run_cli([])
    return {
        option: describe(action)
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
        for option in action.option_strings
    }


def describe(action: argparse.Action) -> dict[str, Any]:
    flag = FLAGS.get(type(action).__name__)
    if flag is not None:
        return {"action": flag}
    kind = {"type": getattr(action.type or str, "__name__", "str")}
    return {**kind, **{key: value for key in ("nargs", "choices") if (value := getattr(action, key)) is not None}}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def answer(arguments: list[str]) -> dict[str, Any]:
    said: dict[str, Any] = {"version": version("openrlhf"), "versions": {name: version(name) for name in PACKAGES}}
    try:
        return {**said, "args": resolve(arguments)}
    except (RefusedError, AssertionError) as error:
        return {**said, "refused": str(error)}
    except Exception as error:
        return {**said, "failed": f"{type(error).__name__}: {error}"}


def main(arguments: list[str]) -> None:
    here = str(Path(__file__).parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]  # its files are no modules of OpenRLHF's
    if arguments[:1] == ["--record"]:
        lines = (f"{json.dumps(name)}: {json.dumps(option)}" for name, option in sorted(record().items()))
        text = ",\n".join(lines)
        Path(arguments[1]).write_text(f'{{"version": "{version("openrlhf")}", "options": {{\n{text}\n}}}}\n')
    else:
        print(f"\n{ANSWER}{json.dumps(answer(arguments))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

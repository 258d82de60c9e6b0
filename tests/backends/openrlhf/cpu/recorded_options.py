"""OpenRLHF's options as its parser has them, in ``recorded_options.json``: fast tests check command lines by them.

Anew, by hand: OPENRLHF_PYTHON tests/backends/openrlhf/cpu/recorded_options.py FILE, with ``openrlhf_env`` of conftest.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

RECORD = Path(__file__).with_suffix(".json")
FLAGS = {"_StoreTrueAction": "store_true", "_StoreFalseAction": "store_false"}
TYPES = {"str": str, "int": int, "float": float}


def parse(words: list[str]) -> dict[str, Any]:
    """The values of these options; ``SystemExit`` for an unknown option or a wrong value."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for option, record in json.loads(RECORD.read_text(encoding="utf-8")).items():
        kind = {"type": TYPES[record["type"]]} if "type" in record else {}
        parser.add_argument(option, dest=option, **{**record, **kind})
    return vars(parser.parse_args(words))


class Found(BaseException):
    pass


def record() -> dict[str, dict[str, Any]]:
    """Each option's type, number of values and choices, or that it is a flag."""
    with mock.patch("argparse.ArgumentParser.parse_args", side_effect=Found, autospec=True) as parse_args:
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
        except Found:
            (parser,) = parse_args.call_args.args
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return {option: describe(action) for action in actions for option in action.option_strings}


def describe(action: argparse.Action) -> dict[str, Any]:
    flag = FLAGS.get(type(action).__name__)
    if flag is not None:
        return {"action": flag}
    kind = {"type": getattr(action.type or str, "__name__", "str")}
    return {**kind, **{key: value for key in ("nargs", "choices") if (value := getattr(action, key)) is not None}}


if __name__ == "__main__":
    lines = [f"{json.dumps(option)}: {json.dumps(facts)}" for option, facts in sorted(record().items())]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

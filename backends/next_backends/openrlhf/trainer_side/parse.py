"""What OpenRLHF's own parser makes of a command line: ``parse.py VERSION OPTION...`` prints one line of JSON.

Starts neither Ray nor a model. Exits with status 2, as argparse does, when OpenRLHF refuses the command line.
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

ANSWER = "next-core answer: "


class Found(BaseException):
    """Ends the command line where its work would begin; holds what it had by then."""

    def __init__(self, value: Any) -> None:
        self.value = value


def found(value: Any, *_: Any) -> NoReturn:
    raise Found(value)


def plain(value: Any) -> Any:
    return {key: plain(item) for key, item in vars(value).items()} if isinstance(value, SimpleNamespace) else value


def main(version: str, *options: str) -> None:
    if metadata.version("openrlhf") != version:
        sys.exit(f"it has OpenRLHF {metadata.version('openrlhf')}")
    sys.argv = ["train_ppo_ray", *options]
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]  # not OpenRLHF's modules
    # After its checks OpenRLHF looks for a Ray and makes a strategy from the arguments.
    with mock.patch("ray.is_initialized", return_value=True), mock.patch("openrlhf.utils.get_strategy", found):
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
        except AssertionError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        except Found as end:
            print(f"\n{ANSWER}{json.dumps(plain(end.value))}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The environment that OpenRLHF is installed in: its variables, and what its own parser says about a command line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_core.errors import ConfigError

if TYPE_CHECKING:
    from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig

VERSION = "0.11.2"
"""The release of OpenRLHF that this backend drives."""
TRAINER_SIDE = Path(__file__).parent / "trainer_side"
PARSE = TRAINER_SIDE / "parse.py"
ANSWER = "openrlhf parser: "
"""How the line of ``PARSE`` begins; its libraries print other lines."""
REFUSED = 2
"""The exit status of ``PARSE`` when OpenRLHF refuses the command line."""
TIMEOUT = 300.0
"""Seconds; most of it goes into imports."""
OWN = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
"""Variables of our own environment that would mislead another Python."""


def variables(config: OpenRlhfConfig) -> dict[str, str]:
    """Return the environment of a program of OpenRLHF's: this process's, then ``backend.env``."""
    kept = {key: value for key, value in os.environ.items() if key not in OWN}
    return kept | {"PATH": f"{config.python.parent}{os.pathsep}{kept.get('PATH', '')}"} | config.env


def parse(config: OpenRlhfConfig, options: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that OpenRLHF's own parser and checks make of a command line.

    Raises ``ConfigError`` for an environment without this OpenRLHF, or with OpenRLHF's message.
    """
    try:
        done = subprocess.run(
            [config.python, PARSE, VERSION, *options],
            env=variables(config),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it did not answer in {TIMEOUT:g} s"
        raise _wrong_environment(config, f"cannot be run: {reason}") from None
    found = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if found:
        args: dict[str, Any] = json.loads(found[-1].removeprefix(ANSWER))
        return args
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    if done.returncode == REFUSED:
        raise ConfigError(f"OpenRLHF refuses the command line: {last}", kind="config-invalid-value")
    raise _wrong_environment(config, f"cannot parse OpenRLHF's command line: {last}")


def _wrong_environment(config: OpenRlhfConfig, reason: str) -> ConfigError:
    return ConfigError(
        f"backend.python: {config.python} {reason}; create an environment with openrlhf=={VERSION} and name its "
        "bin/python",
        kind="config-missing-package",
    )

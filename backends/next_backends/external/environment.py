"""The environment that a trainer is installed in: its variables, and what its own parser says about options."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from next_core.errors import ConfigError, invalid_value

ANSWER = "next-core answer: "  # How the line of a script begins that answers ``ask``; its libraries print other lines
REFUSED = 2  # The exit status of such a script when the library refuses the options
TIMEOUT = 300.0  # Seconds; most of it goes into imports
OWN = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")  # Variables of our own environment that would mislead another Python


def variables(config: Any) -> dict[str, str]:
    """Return the environment of a trainer's program: this process's, then ``backend.env``."""
    kept = {key: value for key, value in os.environ.items() if key not in OWN}
    path: dict[str, str] = {"PATH": f"{config.python.parent}{os.pathsep}{kept.get('PATH', '')}"}
    return kept | path | dict(config.env)


def ask(config: Any, library: str, version: str, script: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return what ``script`` answers about the options of a library's release, in the environment of ``config``.

    Raises ``ConfigError`` for an environment without this release, or with the library's message.
    """

    def wrong_environment(reason: str) -> ConfigError:
        return ConfigError(
            f"backend.python: {config.python} {reason}; create an environment with {library.lower()}=={version} and "
            "name its bin/python",
            kind="config-missing-package",
        )

    try:
        done = subprocess.run(
            [config.python, script, version, *options],
            env=variables(config),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it did not answer in {TIMEOUT:g} s"
        raise wrong_environment(f"cannot be run: {reason}") from None
    found = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if found:
        answer: dict[str, Any] = json.loads(found[-1].removeprefix(ANSWER))
        return answer
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    if done.returncode == REFUSED:
        raise invalid_value(f"{library} refuses the command line: {last}")
    raise wrong_environment(f"cannot parse {library}'s command line: {last}")

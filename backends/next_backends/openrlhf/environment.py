"""The environment that OpenRLHF is installed in: whether it is one, and what its OpenRLHF says of a command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from next_backends.openrlhf.known_options import KNOWN
from next_core.errors import ConfigError

if TYPE_CHECKING:
    from next_backends.openrlhf.openrlhf_config import OpenRlhfConfig

PARSE = Path(__file__).parent / "trainer_side" / "parse.py"
ANSWER = "openrlhf parser: "
"""How the line of ``PARSE`` begins; all else that it prints is its libraries'."""
TIMEOUT = 300.0
"""Seconds; most of it goes into imports."""
NOT_OURS = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
"""Variables of our own environment that would mislead another Python."""


def check_python(config: OpenRlhfConfig) -> None:
    """Raise ``ConfigError`` where ``backend.python`` is no program."""
    remedy = f"make an environment with openrlhf=={KNOWN[-1]} and name its bin/python"
    if not config.python.is_file():
        raise ConfigError(f"backend.python: {config.python} does not exist; {remedy}")
    if not os.access(config.python, os.X_OK):
        raise ConfigError(f"backend.python: {config.python} is not executable; {remedy}")


def environment(python: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The variables of a program in the environment of ``python``: this process's, and ``env`` on top."""
    kept = {key: value for key, value in os.environ.items() if key not in NOT_OURS}
    return kept | {"PATH": f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"} | dict(env)


def ask_parser(python: Path, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """What OpenRLHF's own parser and checks make of a command line, by the interpreter of its environment.

    Returns {"version", "versions", "args"}; raises ``ConfigError`` with its message.
    """
    answer = _ask(python, arguments, env)
    found = answer["version"]
    if found not in KNOWN:
        having = f"has OpenRLHF {found}" if found else "has no OpenRLHF"
        raise ConfigError(f"backend.python: {python} {having}; this backend drives {', '.join(KNOWN)}")
    if "failed" in answer:
        raise ConfigError(f"backend.python: OpenRLHF does not run in the environment of {python}: {answer['failed']}")
    if "refused" in answer:
        raise ConfigError(f"OpenRLHF refuses the command line: {answer['refused']}")
    return answer


def _ask(python: Path, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    try:
        process = subprocess.Popen(
            [python, PARSE, *arguments],
            env=environment(python, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"backend.python: {python} cannot be run: {error.strerror}") from None
    with process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise ConfigError(f"backend.python: OpenRLHF's parser did not answer in {TIMEOUT:g} s") from None
            raise
    lines = [line for line in out.splitlines() if line.startswith(ANSWER)]
    if not lines:
        last = (err.strip() or out.strip()).splitlines()[-1:]
        raise ConfigError(
            f"backend.python: {python} cannot run OpenRLHF's parser: {''.join(last) or 'it said nothing'}"
        )
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix(ANSWER))
    return answer

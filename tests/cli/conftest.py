"""Shared by the tests of the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli, LoraRun, Outcome


def facts(outcome: Outcome) -> dict[str, Any]:
    """Return the one line of standard output as strict JSON."""
    assert outcome.code == 0, outcome.err

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    (line,) = outcome.out.splitlines()
    return json.loads(line, parse_constant=refuse)


def assert_fails(outcome: Outcome, code: int, kind: str, *names: object) -> None:
    """Assert the exit code and one error, last on standard error, with its kind (or the area of its kind) and names."""
    assert outcome.code == code, outcome.err
    assert re.search(rf"\[{kind}(-[a-z-]+)?\]\n\Z", outcome.err), outcome.err
    assert outcome.err.count(f"[{kind}") == 1
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for name in names:
        assert str(name) in outcome.err, f"{name!r} is not in: {outcome.err}"


@pytest.fixture
def extrapolate(cli: Cli, lora_run: LoraRun, tmp_path: Path) -> Cli:
    """``extrapolate("--json", checkpoints=..., out=..., predictor=...)``, 10 steps ahead by default."""

    def run(*more: object, **options: object) -> Outcome:
        given = {"checkpoints": lora_run.path, "out": tmp_path / "out", "horizon": 10} | options
        return cli("extrapolate", *(x for key, value in given.items() for x in (f"--{key}", value)), *more)

    return run

"""The run that is killed, and what it comes to when nobody kills it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.crash import small_run, work
from tests.crash.facts import differences, facts
from tests.crash.processes import Outcome, call
from tests.crash.reader import damages


@dataclass(frozen=True)
class Whole:
    """A run that was not killed: its fields, what it came to, the failpoints it passed, and how long it took."""

    way: str
    raw: dict[str, Any]
    facts: dict[str, Any]
    points: list[work.Point]
    seconds: float

    def go(self, out: Path, *more: Any) -> Outcome:
        """The same command in ``out``, in a process of its own; ``more`` as ``work.go`` has it."""
        return call(work.go, self.way, self.raw, out, *more)

    def ends(self, out: Path) -> None:
        """That the same command, given again, ends as the run that was not killed."""
        again = self.go(out)
        assert again.code == 0, again.error
        self.check(out)

    def check(self, out: Path) -> None:
        """That a run in ``out``, which has ended, came to the same bit for bit, and left nothing lying about."""
        assert damages(out) == []
        assert differences(facts(out), self.facts) == []
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        assert [path for path in out.rglob(".*") if path.suffix != ".lock"] == []  # a dead process holds no lock


def _whole(way: str, folder: Path, raw: dict[str, Any] | None = None) -> Whole:
    raw = raw or small_run.raw_config(folder / "data")
    out = folder / "whole" / "run"
    outcome = call(work.go, way, raw, out)
    assert outcome.code == 0, outcome.error
    return Whole(way, raw, facts(out), outcome.value.points, outcome.value.seconds)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole("run", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def whole_callback(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole("callback", tmp_path_factory.mktemp("callback"))


@pytest.fixture(scope="session")
def whole_needed(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("needed")
    return _whole("run", folder, small_run.needed_config(folder / "data"))


@pytest.fixture(scope="session")
def whole_scaling(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("scaling")
    return _whole("run", folder, small_run.scaling_config(folder / "data"))

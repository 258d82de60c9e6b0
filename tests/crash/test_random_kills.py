"""Killed at random moments, again and again, until a run has ended all the same."""

import os
import random
from pathlib import Path

import pytest

from tests.crash import work
from tests.crash.conftest import Whole
from tests.crash.processes import Child
from tests.crash.reader import damages

pytestmark = [pytest.mark.trl, pytest.mark.crash]
SEED = int(os.environ.get("CRASH_SEED", "0"))
IN_ALL = int(os.environ.get("CRASH_KILLS", "200"))
KILLS = {"run": IN_ALL // 2, "callback": IN_ALL // 4, "scaling": IN_ALL // 4}


@pytest.mark.parametrize("way", KILLS)
def test_killed_at_random_moments_a_run_ends_as_if_nobody_had_killed_it(
    way: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Whole = request.getfixturevalue(f"whole_{way}")
    kills, runs, chance = 0, 0, random.Random(SEED)
    while kills < KILLS[way]:
        out, span = tmp_path / str(runs) / "run", whole.seconds
        out.parent.mkdir()
        while True:
            child = Child(work.go, whole.way, whole.raw, out)
            outcome = child.wait(chance.uniform(0, span)) if kills < KILLS[way] else child.ended()
            if outcome is None:
                outcome = child.kill()
            if not outcome.killed:
                assert outcome.code == 0, outcome.error
                break
            kills += 1
            assert damages(out) == []
            span *= 1.1  # a machine that has become slow must get past the start
        whole.check(out)
        runs += 1
    with capsys.disabled():
        print(f"\n{way}: seed {SEED}, {kills} kills; {runs} runs ended and were compared bit for bit")

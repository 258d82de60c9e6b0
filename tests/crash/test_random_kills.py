"""Killed at random moments, again and again, until a run has ended all the same."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from next_core.storage.manifest import MANIFEST
from tests.crash import work
from tests.crash.conftest import Whole
from tests.crash.processes import Child
from tests.crash.reader import damages, read_on

pytestmark = [pytest.mark.trl, pytest.mark.crash]
SEED = int(os.environ.get("CRASH_SEED", "0"))
IN_ALL = int(os.environ.get("CRASH_KILLS", "200"))
KILLS = {"run": IN_ALL - 3 * IN_ALL // 10, "callback": 3 * IN_ALL // 10}


@dataclass
class Count:
    """What happened."""

    kills: int = 0
    runs: int = 0
    looks: int = 0
    phases: Counter[str] = field(default_factory=Counter)


@pytest.mark.parametrize("way", KILLS)
def test_killed_at_random_moments_a_run_ends_as_if_nobody_had_killed_it(
    way: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Whole = request.getfixturevalue(f"whole_{way}")
    count, chance = Count(), random.Random(SEED)
    while count.kills < KILLS[way]:
        out, stop = tmp_path / str(count.runs) / "run", tmp_path / f"stop-{count.runs}"
        reader = Child(read_on, out, stop)
        until_it_ends(whole, out, KILLS[way], chance, count)
        stop.touch()
        read = reader.ended()
        assert read.code == 0, read.error
        looks, found = read.value
        assert found == []
        whole.check(out)
        shutil.rmtree(out)
        count.runs += 1
        count.looks += looks
    with capsys.disabled():
        print(
            f"\n{way}: seed {SEED}, {count.kills} kills, each followed by the same command; {count.runs} runs ended "
            f"and were compared bit for bit; a reader looked {count.looks} times"
        )
        for what, kills in count.phases.most_common():
            print(f"  {kills:4d} killed while {what}")


def until_it_ends(whole: Whole, out: Path, most: int, chance: random.Random, count: Count) -> None:
    """One run, killed at moments that lie anywhere in it, until it has ended."""
    out.parent.mkdir(parents=True)
    phase = out.parent.with_suffix(".phase")
    phase.write_bytes(bytes(work.PHASE_BYTES))
    span = whole.seconds
    while True:
        halves = half_written(out)
        child = Child(work.go, whole.way, whole.raw, out, None, work.kill, phase)
        outcome = child.wait(chance.uniform(0, span)) if count.kills < most else child.ended()
        if outcome is None:
            outcome = child.kill()
        if not outcome.killed:
            assert outcome.code == 0, outcome.error
            return
        count.kills += 1
        what = phase.read_bytes().decode().strip(" \0") or "being forked"
        # On a machine that has become slow, more than the start must be lived to see.
        span = span * 1.25 if what == work.STARTING else max(whole.seconds, span * 0.9)
        if what == work.TRAINING and half_written(out) - halves:
            what = "the trainer wrote its checkpoint"
        count.phases[work.Point("", what, 0).kind[1]] += 1
        assert damages(out) == []


def half_written(out: Path) -> set[Path]:
    """The trainer's checkpoints that are not sealed."""
    return {path for path in out.glob("**/checkpoint-*") if not (path / MANIFEST).exists()}

"""Damaged files end in an error of ours or are valid: some thousands always, a hundred thousand with ``-m fuzz``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.targets import TARGETS, fresh


def fuzz(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", "--keep", str(tmp_path / "kept"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("cases", [3000, pytest.param(100_000, marks=pytest.mark.fuzz)])
def test_damaged_files_are_refused_by_our_errors_or_valid(tmp_path: Path, cases: int) -> None:
    done = fuzz(tmp_path, "--cases", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"^(\S+) +(\d+) cases .*(?:valid|Error) \d+", done.stdout, re.MULTILINE)
    assert [kind for kind, _ in told] == list(TARGETS)
    assert "seed 0: 0 faults" in done.stdout


def test_a_case_is_decided_by_its_seed_and_is_damaged_as_a_rule(tmp_path: Path) -> None:
    folder = fresh(tmp_path / "examples")
    for target in TARGETS.values():
        whole = (folder / target.file).read_bytes()
        cases = [target.mutate(Random(seed), whole) for seed in range(50)]
        assert cases == [target.mutate(Random(seed), whole) for seed in range(50)]
        assert len(set(cases) - {whole}) > 30


def test_a_fault_is_kept_and_can_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "jump.0.0").write_text("{}")
    done = fuzz(tmp_path, "--replay", tmp_path / "jump.0.0")
    assert (done.returncode, done.stdout) == (0, "CheckpointError\n")

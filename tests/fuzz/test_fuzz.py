"""Damaged files end in an error of ours or are valid: some hundreds here, a hundred thousand with ``make fuzz``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.__main__ import fuzz, outcome
from tests.fuzz.targets import TARGETS, fresh


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tmp_path_factory.mktemp("fuzz") / "examples")


def test_damaged_files_are_refused_by_our_errors_or_valid(examples: Path, tmp_path: Path) -> None:
    outcomes = fuzz(examples, list(TARGETS), cases=1000, seed=0, keep=tmp_path / "kept")
    for kind, counts in outcomes.items():
        assert sum(counts.values()) > 0
        assert set(counts) <= {"valid", "ConfigError", "PluginError", "CheckpointError"}, kind
    assert not (tmp_path / "kept").exists()


def test_a_seed_determines_a_case_and_most_cases_are_damaged(examples: Path) -> None:
    for target in TARGETS.values():
        whole = (examples / target.file).read_bytes()
        cases = [target.mutate(Random(seed), whole) for seed in range(50)]
        assert cases == [target.mutate(Random(seed), whole) for seed in range(50)]
        assert len(set(cases) - {whole}) > 30


def test_a_fault_is_kept_and_can_be_replayed(examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise TypeError("a bug")

    monkeypatch.setitem(TARGETS, "jump", dataclasses.replace(TARGETS["jump"], read=broken))
    assert fuzz(examples, ["jump"], cases=1, seed=3, keep=tmp_path)["jump"]["FAULT"] == 1
    [kept] = tmp_path.iterdir()
    assert kept.name == "jump.3.0"
    assert outcome("jump", examples, kept.read_bytes()).startswith("FAULT")
    monkeypatch.undo()
    assert outcome("jump", examples, kept.read_bytes()) in ("valid", "CheckpointError")

"""Damaged files end in an error of ours or are valid: some hundreds here, a hundred thousand with ``make fuzz``."""

import dataclasses
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import TARGETS, write_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("fuzz") / "examples")


def test_damaged_files_are_refused_by_our_errors_or_valid(examples: Path) -> None:
    for kind, counts in fuzz(examples, list(TARGETS), cases=1000, seed=0).items():
        assert sum(counts.values()) > 0
        assert set(counts) <= {"valid", "ConfigError", "PluginError", "CheckpointError"}, kind


def test_a_seed_determines_a_case_and_most_cases_are_damaged(examples: Path) -> None:
    for target in TARGETS.values():
        whole = (examples / target.file).read_bytes()
        cases = [target.mutate(Random(seed), whole) for seed in range(50)]
        assert cases == [target.mutate(Random(seed), whole) for seed in range(50)]
        assert len(set(cases) - {whole}) > 30


def test_a_fault_is_counted(
    examples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "jump", dataclasses.replace(TARGETS["jump"], read=lambda file: 1 / 0))
    assert fuzz(examples, ["jump"], cases=1, seed=3)["jump"]["FAULT"] == 1
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("ZeroDivisionError", "seed 3, jump 0"))

"""The language-model benchmark: its data, rewards and configs. No model is loaded."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from next_core.config import make_config
from next_core.rewards import MathVerifyReward

FOLDER = Path(__file__).parents[2] / "benchmarks" / "llm"


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prepare")


@pytest.fixture
def llm_run(monkeypatch: pytest.MonkeyPatch, prepare: Any) -> Any:
    monkeypatch.setattr("sys.path", list(sys.path))  # run.py adds to it
    return importlib.import_module("run")


@pytest.mark.parametrize("task", ["arithmetic", "word-problems"])
def test_splits_are_disjoint_and_the_same_every_time(prepare: Any, task: str) -> None:
    found = prepare.splits(task)
    assert found == prepare.splits(task)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 7936, "validation": 64, "test": 64}
    assert len({row["prompt"] for rows in found.values() for row in rows}) == 7936 + 64 + 64


def test_files_hold_the_splits(prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = prepare.data("arithmetic")["test"]
    assert file.is_relative_to(tmp_path)
    assert [json.loads(line) for line in file.read_text().splitlines()] == prepare.splits("arithmetic")["test"]


def test_the_answer_of_a_sum_is_right_and_another_number_is_wrong(prepare: Any) -> None:
    reward = MathVerifyReward()
    for row in prepare.splits("arithmetic")["test"]:
        question = row["prompt"].splitlines()[-1].removesuffix("=")
        a, b = map(int, question.split("+"))
        texts = [row["answer"], f" {a + b - 10}", f" {a} + {b}", ""]
        assert reward(texts, [row["answer"]] * 4) == [1, 0, 0, 0], row


def test_a_word_problem_is_judged_by_its_last_number(prepare: Any) -> None:
    reward = MathVerifyReward()
    for row in prepare.splits("word-problems")["test"]:
        right = int(row["answer"])
        texts = [f" 1 + 2 = 3. The answer is {number}." for number in (right, right + 1)]
        assert reward([*texts, f" The answer is {right}. The answer is 1000."], [row["answer"]] * 3) == [1, 0, 0], row
        assert right > 0


@pytest.mark.parametrize("arm", ["plain", "auto", "next-mlp"])
def test_every_arm_has_a_config(
    llm_run: Any, prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    values = ("word-problems", 1e-5, arm, 16, 3, 100)
    key = dict(zip(llm_run.KEY, values, strict=True))
    config = make_config(llm_run.run_config(key, tmp_path, prepare.data("word-problems")))
    assert (config.steps, config.seed, config.training.learning_rate) == (100, 3, 1e-5)
    if arm == "next-mlp":  # of 250 steps: observe 150, every 10, horizon 50, settle 100
        schedule = config.schedule
        assert (schedule.observe, schedule.every, schedule.horizon, schedule.settle) == (60, 4, 20, 40)

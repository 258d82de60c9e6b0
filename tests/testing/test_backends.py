"""The backends keep the contract: the real TRL on a tiny run. OpenRLHF's tests are in ``tests/backends/openrlhf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from next_core import registry
from next_core.config import make_config
from next_core.testing import BackendCase, Check, checks_of

ARITHMETIC = Path(__file__).parents[2] / "examples" / "arithmetic"
ELSEWHERE = {
    "openrlhf": "a run takes minutes, in an environment of its own; its pretended trainer has one matrix and one prompt"
}
"""Backends that are not checked here, and why."""


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> BackendCase:
    folder = tmp_path_factory.mktemp("trl")
    validation = folder / "validation.jsonl"
    validation.write_text("".join((ARITHMETIC / "validation.jsonl").read_text().splitlines(keepends=True)[:8]))
    training = {
        "model": ARITHMETIC / "base",
        "data": {"train": ARITHMETIC / "train.jsonl", "validation": validation},
        "reward": f"{__name__}:exact",
        "learning_rate": 1e-3,
        "prompts_per_step": 4,
        "generations": 4,
        "max_new_tokens": 4,
    }
    schedule = {"observe": 2, "every": 1, "horizon": 1, "jump_every": 1}
    run = make_config({"steps": 4, "save_every": 2, "training": training, "predictor": "secant", "schedule": schedule})
    return BackendCase(registry().make("backend", "trl"), run, folder)


@pytest.mark.trl
@pytest.mark.parametrize("check", checks_of("backend").values(), ids=checks_of("backend"))
def test_trl_keeps_the_contract(check: Check, trl: BackendCase) -> None:
    check(trl)


def test_every_installed_backend_is_checked_or_it_is_said_why_not() -> None:
    assert set(registry().names("backend")) == {"trl", *ELSEWHERE}

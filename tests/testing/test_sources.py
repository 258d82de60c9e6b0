"""Every source that is installed with next-core keeps the contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from next_core import open_checkpoints, registry
from next_core.interfaces import CheckpointSource
from next_core.sources.replay import Past, Signs
from next_core.testing import (
    Check,
    checks_of,
    dense_run,
    lora_run,
    write_lora_run,
    write_model_run,
)


def adapters(folder: Path) -> CheckpointSource:
    write_lora_run(folder / "checkpoints")
    return open_checkpoints(folder / "checkpoints")


def adapters_without_a_start(folder: Path) -> CheckpointSource:
    write_lora_run(folder / "checkpoints", lora_run(start=False))
    return open_checkpoints(folder / "checkpoints")


def models(folder: Path) -> CheckpointSource:
    write_model_run(folder / "checkpoints")
    return open_checkpoints(folder / "checkpoints", backbone=folder / "base")


def listed(folder: Path) -> CheckpointSource:
    write_lora_run(folder / "checkpoints")
    return open_checkpoints(sorted((folder / "checkpoints").iterdir()))


def past(folder: Path) -> CheckpointSource:
    return Past(lora_run(), 40)


def random_walk(folder: Path) -> CheckpointSource:
    run = lora_run()
    return Past(run, 40, Signs(0, 0, run.steps))


RUNS: dict[str, tuple[str, Callable[[Path], CheckpointSource]]] = {
    "memory, LoRA": ("memory", lambda folder: lora_run()),
    "memory, dense": ("memory", lambda folder: dense_run()),
    "adapters": ("peft-adapter", adapters),
    "adapters without step 0": ("peft-adapter", adapters_without_a_start),
    "adapters, listed": ("peft-adapter", listed),
    "models": ("full-model", models),
    "past": ("past", past),
    "past, random signs": ("past", random_walk),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CheckpointSource]:
    """Each run is made once."""
    return cache(lambda run: RUNS[run][1](tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("check", checks_of("source").values(), ids=checks_of("source"))
@pytest.mark.parametrize("run", RUNS)
def test_it_keeps_the_contract(run: str, check: Check, opened: Callable[[str], CheckpointSource]) -> None:
    check(opened(run))


def test_every_installed_source_has_a_run_to_be_checked_on() -> None:
    assert set(registry().names("source")) <= {source for source, _ in RUNS.values()}


@pytest.mark.parametrize("run", RUNS)
def test_the_runs_are_of_the_sources_that_they_are_said_to_be(
    run: str, opened: Callable[[str], CheckpointSource]
) -> None:
    assert opened(run).name == RUNS[run][0]

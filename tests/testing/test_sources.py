"""Every installed source keeps the contract, and each check of sources fails on a source that breaks it."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core import open_checkpoints, registry
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import dense
from next_core.sources.source_views import RandomWalk, UpTo
from next_core.testing import Check, SyntheticRun, check_source, checks_of, dense_run, lora_run, write_lora_run
from tests.testing.helpers import COMMON, fails, write_model_run


def adapters(folder: Path, run: SyntheticRun | None = None) -> CheckpointSource:
    write_lora_run(folder / "checkpoints", run)
    return open_checkpoints(folder / "checkpoints")


def models(folder: Path) -> CheckpointSource:
    write_model_run(folder / "checkpoints")
    return open_checkpoints(folder / "checkpoints", backbone=folder / "base")


RUNS: dict[str, tuple[str, Callable[[Path], CheckpointSource]]] = {
    "memory, LoRA": ("memory", lambda folder: lora_run()),
    "memory, dense": ("memory", lambda folder: dense_run()),
    "adapters": ("peft-adapter", adapters),
    "adapters without step 0": ("peft-adapter", lambda folder: adapters(folder, lora_run().only((5, 10, 15)))),
    "models": ("full-model", models),
    "up to a step": ("up-to", lambda folder: UpTo(lora_run(), 40)),
    "random walk": ("up-to", lambda folder: UpTo(RandomWalk(lora_run(), 0, 0), 40)),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CheckpointSource]:
    """Each run is made once."""
    return cache(lambda run: RUNS[run][1](tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("check", checks_of("source").values(), ids=checks_of("source"))
@pytest.mark.parametrize("run", RUNS)
def test_a_source_keeps_the_contract(run: str, check: Check, opened: Callable[[str], CheckpointSource]) -> None:
    assert opened(run).name == RUNS[run][0]
    check(opened(run))


def test_every_installed_source_is_checked_on_some_run() -> None:
    assert set(registry().names("source")) <= {source for source, _ in RUNS.values()}


def delta_that(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A ``delta`` that is changed before it is returned."""
    return lambda self, name, step, since=None: change(SyntheticRun.delta(self, name, step, since))


def rows_from_the_top(self: Any, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
    whole = dense(self.delta(name, step, since))
    return whole[: len(range(*rows.indices(len(whole))))]


WRONG: list[tuple[str, Mapping[str, Any]]] = [
    ("lists_steps_and_parameters", {"steps": property(lambda self: SyntheticRun.steps.fget(self)[::-1])}),
    ("lists_steps_and_parameters", {"delta": delta_that(dense)}),
    ("deltas_add_up", {"delta": delta_that(lambda found: found.scale(torch.nan))}),
    ("deltas_add_up", {"delta": lambda self, name, step, since=None: SyntheticRun.delta(self, name, step)}),
    ("deltas_add_up", {"delta_rows": rows_from_the_top}),
    ("deltas_add_up", {"position": lambda self, name, step: self.delta(name, 15)}),
    ("factors_give_the_delta", {"delta": delta_that(lambda found: found.scale(2.0))}),
    (
        "refuses_unknown_steps_and_parameters",
        {"delta": lambda self, name, step, since=None: SyntheticRun.delta(self, name, min(step, 15), since)},
    ),
    ("reads_the_same_again", {"__reduce_ex__": lambda self, protocol: (lora_run, ((5, 10),))}),
    ("reads_the_same_again", {"fingerprint": lambda self, step: "always the same"}),
]


@pytest.mark.parametrize(("check", "overrides"), WRONG, ids=[check for check, _ in WRONG])
def test_a_check_fails_on_a_source_that_breaks_it(check: str, overrides: Mapping[str, Any]) -> None:
    run, wrong = lora_run((5, 10, 15)), type("Wrong", (SyntheticRun,), dict(overrides))
    assert fails(check, "source", wrong(run.weights, None, run._metrics))


def test_silent_damage_and_stale_fingerprints_are_found(tmp_path: Path) -> None:
    right = adapters(tmp_path)
    check_source(right)
    stale = type("Stale", (type(right),), {"fingerprint": lambda self, step: f"step {step}"})
    assert fails("names_damaged_files", "source", stale(right.config))
    placed = type("Placed", (type(right),), {"fingerprint": lambda self, step: f"{self.config.path}, {step}"})
    assert fails("names_damaged_files", "source", placed(right.config))
    assert fails("names_damaged_files", "source", open_checkpoints(tmp_path / "checkpoints", skip_damaged=True))


def test_every_check_has_a_source_that_breaks_it() -> None:
    assert {name for name, _ in WRONG} | {COMMON, "names_damaged_files"} == set(checks_of("source"))

"""Every installed source keeps the contract, and each check of sources fails on a source that breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from next_core import open_checkpoints, registry
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.mathematics.low_rank import dense
from next_core.settings import Settings
from next_core.sources.memory import MemorySource
from next_core.sources.source_views import RandomWalk, UpTo
from next_core.testing import (
    Check,
    SyntheticRun,
    check_source,
    checks_of,
    dense_run,
    lora_run,
    write_lora_run,
    write_model_run,
)
from next_core.types import Parameter
from tests.testing.breaking import COMMON, fails


def adapters(folder: Path, **changes: Any) -> CheckpointSource:
    write_lora_run(folder / "checkpoints", lora_run(**changes))
    return open_checkpoints(folder / "checkpoints")


def models(folder: Path) -> CheckpointSource:
    write_model_run(folder / "checkpoints")
    return open_checkpoints(folder / "checkpoints", backbone=folder / "base")


def listed(folder: Path) -> CheckpointSource:
    write_lora_run(folder / "checkpoints")
    return open_checkpoints(sorted((folder / "checkpoints").iterdir()))


RUNS: dict[str, tuple[str, Callable[[Path], CheckpointSource]]] = {
    "memory, LoRA": ("memory", lambda folder: lora_run()),
    "memory, dense": ("memory", lambda folder: dense_run()),
    "adapters": ("peft-adapter", adapters),
    "adapters without step 0": ("peft-adapter", lambda folder: adapters(folder, start=False)),
    "adapters, listed": ("peft-adapter", listed),
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
def test_an_installed_source_keeps_the_contract(
    run: str, check: Check, opened: Callable[[str], CheckpointSource]
) -> None:
    assert opened(run).name == RUNS[run][0]
    check(opened(run))


def test_every_installed_source_is_checked_on_some_run() -> None:
    assert set(registry().names("source")) <= {source for source, _ in RUNS.values()}


class Right(SyntheticRun):
    """A short synthetic run; overrides make it lie."""

    def __init__(self, **changes: Any) -> None:
        run = lora_run((5, 10, 15), **changes)
        super().__init__(run.weights, None, {step: run.metrics(step) for step in run.steps})


class FolderConfig(Settings):
    path: Path


class RightOnDisk(CheckpointSource):
    """The B factor of one matrix as a dense matrix, read from folders ``checkpoint-N``."""

    name = "right-on-disk"
    config_class = FolderConfig

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        found = sorted((int(folder.name.split("-")[1]), folder) for folder in config.path.glob("checkpoint-*"))
        self.inner = MemorySource({step: {"w": self.read(folder)} for step, folder in found}, {"w": torch.zeros(6, 3)})

    def read(self, folder: Path) -> Tensor:
        try:
            value = load_b(folder)
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from None
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{folder} has values that are not finite")
        return value

    @classmethod
    def detect(cls, path: Path) -> bool:
        return any(path.glob("checkpoint-*/adapter_model.safetensors"))

    @property
    def steps(self) -> tuple[int, ...]:
        return self.inner.steps

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.inner.parameters

    def fingerprint(self, step: int | None) -> str | None:
        return "start" if step is None else re.sub(r"\W", "", str(self.inner.delta("w", step).tolist()))

    def delta(self, name: str, step: int, since: int | None = None) -> Tensor:
        return dense(self.inner.delta(name, step, since))


def load_b(folder: Path) -> Tensor:
    return load_file(folder / "adapter_model.safetensors")["base_model.model.model.layers.0.q_proj.lora_B.weight"]


def forgiving(self: Any, folder: Path) -> Tensor:
    """Read NaN like any other number."""
    try:
        return load_b(folder)
    except Exception:
        raise CheckpointError(f"{folder} cannot be read") from None


def leaves_out(self: Any, folder: Path) -> Tensor:
    """A missing file counts as weights of zero."""
    exists = (folder / "adapter_model.safetensors").exists()
    return RightOnDisk.read(self, folder) if exists else torch.zeros(6, 3)


def delta_that(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A ``delta`` that is changed before it is returned."""
    return lambda self, name, step, since=None: change(SyntheticRun.delta(self, name, step, since))


def growing(self: Any, name: str, step: int, since: int | None = None) -> Any:
    """A delta that is a little longer each time it is read."""
    self.reads = getattr(self, "reads", 0) + 1
    return SyntheticRun.delta(self, name, step, since).scale(1 + 1e-9 * self.reads)  # type: ignore[union-attr]


def rows_from_the_top(self: Any, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
    whole = dense(self.delta(name, step, since))
    return whole[: len(range(*rows.indices(len(whole))))]


WRONG: list[tuple[str, type[CheckpointSource], Mapping[str, Any]]] = [
    ("steps_ascend", Right, {"steps": property(lambda self: SyntheticRun.steps.fget(self)[::-1])}),
    (
        "parameters_can_be_read_at_every_step",
        Right,
        {"parameters": property(lambda self: 2 * SyntheticRun.parameters.fget(self))},
    ),
    ("parameters_can_be_read_at_every_step", Right, {"delta": delta_that(dense)}),
    ("describes_its_parameters_and_metrics", Right, {"skipped": {"norm.weight": ""}}),
    ("describes_its_parameters_and_metrics", Right, {"notes": "a note"}),
    ("describes_its_parameters_and_metrics", Right, {"precision": lambda self, name: torch.int64}),
    ("deltas_add_up", Right, {"delta": delta_that(lambda found: found.scale(torch.nan))}),
    ("deltas_add_up", Right, {"delta": lambda self, name, step, since=None: SyntheticRun.delta(self, name, step)}),
    ("deltas_add_up", Right, {"delta": delta_that(lambda found: found.scale(0.0))}),
    ("rows_agree_with_the_whole", Right, {"delta_rows": rows_from_the_top}),
    ("factors_give_the_delta", Right, {"delta": delta_that(lambda found: found.scale(2.0))}),
    ("position_moves_with_the_deltas", Right, {"position": lambda self, name, step: self.delta(name, 15)}),
    (
        "refuses_unknown_steps_and_parameters",
        Right,
        {"delta": lambda self, name, step, since=None: SyntheticRun.delta(self, name, min(step, 15), since)},
    ),
    (
        "describes_its_parameters_and_metrics",
        Right,
        {"metrics": lambda self, step, since=None: SyntheticRun.metrics(self, step)},
    ),
    ("reads_the_same_again", Right, {"delta": growing, "__reduce_ex__": lambda self, protocol: (Right, ())}),
    ("reads_the_same_again", Right, {"__reduce_ex__": lambda self, protocol: (lora_run, ((5, 10),))}),
    ("reads_only_its_own_layout_anywhere", RightOnDisk, {"detect": classmethod(lambda cls, path: True)}),
    (
        "reads_only_its_own_layout_anywhere",
        RightOnDisk,
        {"delta": lambda self, *at: RightOnDisk.delta(self, *at) * (1 + len(str(self.config.path)) / 1e9)},
    ),
    ("names_damaged_files", RightOnDisk, {"read": lambda self, folder: load_b(folder)}),
    ("names_damaged_files", RightOnDisk, {"read": leaves_out}),
    ("names_damaged_files", RightOnDisk, {"read": forgiving}),
    ("fingerprints_follow_the_weights", RightOnDisk, {"fingerprint": lambda self, step: "always the same"}),
    ("fingerprints_follow_the_weights", RightOnDisk, {"fingerprint": lambda self, step: f"step {step}"}),
]


def made(cls: Any, folder: Path) -> CheckpointSource:
    if not issubclass(cls, RightOnDisk):
        source: CheckpointSource = cls()
        return source
    write_lora_run(folder / "checkpoints", lora_run((5, 10, 15), start=False))
    return cls(FolderConfig(path=folder / "checkpoints"))


@pytest.mark.parametrize("cls", [Right, RightOnDisk])
def test_what_is_right_passes(cls: type[CheckpointSource], tmp_path: Path) -> None:
    check_source(made(cls, tmp_path))


@pytest.mark.parametrize(("check", "right", "overrides"), WRONG, ids=[check for check, *_ in WRONG])
def test_a_check_fails_on_a_source_that_breaks_it(
    check: str, right: type[CheckpointSource], overrides: Mapping[str, Any], tmp_path: Path
) -> None:
    assert fails(check, "source", made(type("Wrong", (right,), dict(overrides)), tmp_path))


def test_every_check_has_a_source_that_breaks_it() -> None:
    assert {name for name, *_ in WRONG} | COMMON == set(checks_of("source"))


def test_a_folder_is_opened_in_the_layout_that_is_detected(tmp_path: Path) -> None:
    write_lora_run(tmp_path / "checkpoints", lora_run((5, 10)))
    check_source(tmp_path / "checkpoints")


def test_one_checkpoint_is_not_enough_to_check_a_source() -> None:
    with pytest.raises(AssertionError, match="two checkpoints"):
        check_source(lora_run((5,)))

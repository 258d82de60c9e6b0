"""TRL keeps the contract on a tiny run, and each check of backends fails on a backend that breaks it.

OpenRLHF's tests are in ``tests/backends/openrlhf``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from next_core import registry
from next_core.backend import Backend
from next_core.errors import GuardError
from next_core.interfaces import Applied, Prediction
from next_core.mathematics.low_rank import dense
from next_core.run_config import RunConfig
from next_core.settings import Settings
from next_core.sources.memory import MemorySource
from next_core.testing import BackendCase, Check, check_backend, checks_of
from tests.crash import small_run
from tests.testing.helpers import COMMON, fails

ELSEWHERE = {"openrlhf": "a run takes minutes; tests/backends/openrlhf checks it with a simulated trainer"}
"""Backends that are not checked here, and why."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    schedule = {"observe": 2, "every": 1, "horizon": 1, "jump_every": 1, "settle": 0, "average": None}
    folder = tmp_path_factory.mktemp("data")
    return small_run.checked(
        small_run.raw_config(folder, steps=4, save_every=2, schedule=schedule, guards={"recovery": None})
    )


@pytest.fixture(scope="module")
def trl(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> BackendCase:
    return BackendCase(registry().make("backend", "trl"), run, tmp_path_factory.mktemp("trl"))


@pytest.mark.trl
@pytest.mark.parametrize("check", checks_of("backend").values(), ids=checks_of("backend"))
def test_trl_keeps_the_contract(check: Check, trl: BackendCase) -> None:
    check(trl)


def test_every_installed_backend_is_checked_or_listed_with_a_reason() -> None:
    assert set(registry().names("backend")) == {"trl", *ELSEWHERE}


SHAPES = {"a": (4, 3), "b": (3, 4), "c": (4, 4)}
Weights = dict[str, Tensor]


class Source(MemorySource):
    """Its positions include the jumps, which its deltas do not."""

    jumped: Mapping[str, Tensor]

    def position(self, name: str, step: int) -> Tensor:
        return dense(self.delta(name, step)) + self.jumped[name].double()


@dataclasses.dataclass
class Kept(Applied):
    """A jump after a step, and the weights from before it."""

    backend: Right
    step: int
    before: Weights

    def rollback(self) -> None:
        self.backend.rollback(self, self.backend.at)


class Right(Backend):
    """Gradient descent in memory, W -= lr (W - goal); saves its state every ``save_every`` steps."""

    name = "right"
    exact_resume = True
    lr = 0.1

    def __init__(self, config: Settings | None = None) -> None:
        super().__init__(config)
        random = torch.Generator().manual_seed(0)
        self.backbone = {name: torch.randn(*shape, generator=random) for name, shape in SHAPES.items()}
        self.goal = {name: torch.randn(*shape, generator=random) for name, shape in SHAPES.items()}
        self.weights = dict(self.backbone)
        self.kept: dict[int, Weights] = {}
        self.jumps: dict[int, Weights] = {}
        self.undoing: dict[int, Applied] = {}
        self.at = 0

    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        self.run, self.file = run, out / "state.pt"
        if resume and self.file.exists():
            self.at, self.weights, self.kept = torch.load(self.file)
        return self.at

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        while self.at < until:
            self.at += 1
            self.weights = {n: w - self.lr * (w - self.goal[n]) for n, w in self.weights.items()}
            step_ended(self.at)
            if self.run.save_every and self.at % self.run.save_every == 0:
                torch.save((self.at, self.weights, self.kept), self.file)

    def observe(self, step: int) -> None:
        self.kept[step] = dict(self.weights)

    def shift(self, name: str, step: int) -> Tensor:
        """Return the jumps made at a step or later, which its checkpoint is shifted by."""
        moves = [move[name] for made, move in self.jumps.items() if made >= step and name in move]
        return sum(moves, torch.zeros(SHAPES[name]))

    def source(self) -> Source:
        shifted = {step: {n: w + self.shift(n, step) for n, w in kept.items()} for step, kept in self.kept.items()}
        found = Source(shifted, {name: value + self.shift(name, 0) for name, value in self.backbone.items()})
        found.jumped = {name: self.shift(name, 0) for name in SHAPES}
        return found

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        moves = {name: dense(prediction.delta(name, alpha)).float() for name in prediction.updates}
        kept = Kept(self, prediction.step, dict(self.weights))
        self.jumps[prediction.step] = moves
        self.weights = {n: w + moves[n] if n in moves else w for n, w in self.weights.items()}
        if keep:
            self.undoing[prediction.step] = kept
        return kept

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, Kept)
        self.weights = dict(applied.before)
        del self.jumps[applied.step]
        if step > applied.step:
            self.kept.clear()

    def active_jump(self, step: int) -> Applied | None:
        return self.undoing.get(step)


class Launched(Right):
    """A trainer that is driven by segments."""

    in_process = False


def swallow(self: Any, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
    """Ignore a jump that is not finite."""
    try:
        return Right.apply_jump(self, prediction, alpha, keep)
    except GuardError:
        return Kept(self, prediction.step, dict(self.weights))


def rollback_that_slows(self: Any, applied: Applied, step: int) -> None:
    """Restore the weights and not the learning rate."""
    Right.rollback(self, applied, step)
    self.lr = 0.05


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("observed_steps_become_checkpoints", {"prepare": lambda self, *given: Right.prepare(self, *given) or 1}),
    (
        "a_jump_moves_the_weights_and_not_the_history",
        {"apply_jump": lambda self, prediction, alpha, keep=False: Right.apply_jump(self, prediction, 1.0, keep)},
    ),
    ("a_jump_moves_the_weights_and_not_the_history", {"shift": lambda self, name, step: torch.zeros(SHAPES[name])}),
    ("a_jump_moves_the_weights_and_not_the_history", {"apply_jump": swallow}),
    ("rollback_undoes_the_jump", {"rollback": rollback_that_slows}),
    ("rollback_undoes_the_jump", {"active_jump": lambda self, step: None}),
    ("steps_are_multiplied_averaged_and_undone", {"scales_steps": True}),
    ("steps_are_multiplied_averaged_and_undone", {"follow_steps": lambda self, windows: None}),
    ("resumes_from_the_last_save", {"prepare": lambda self, run, out, resume: Right.prepare(self, run, out)}),
]


@pytest.mark.parametrize("cls", [Right, Launched])
def test_what_is_right_passes(cls: type[Right], run: RunConfig, tmp_path: Path) -> None:
    check_backend(BackendCase(cls(), run, tmp_path))


@pytest.mark.parametrize(("check", "overrides"), WRONG, ids=[check for check, _ in WRONG])
def test_a_check_fails_on_a_backend_that_breaks_it(
    check: str, overrides: Mapping[str, Any], run: RunConfig, tmp_path: Path
) -> None:
    wrong = type("Wrong", (Right,), dict(overrides))
    assert fails(check, "backend", BackendCase(wrong(), run, tmp_path))


def test_every_check_has_a_backend_that_breaks_it() -> None:
    assert {name for name, _ in WRONG} | {COMMON} == set(checks_of("backend"))

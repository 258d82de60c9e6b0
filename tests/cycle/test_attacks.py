"""Predictors that do everything wrong, on the real trainer: each is refused with its reason, and nothing else."""

import contextlib
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from next_core.cycle.journal import read_journal
from next_core.cycle.run import run
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.plugins import registry
from next_core.predictor import TrajectoryPredictor
from next_core.process.quiet import quiet_libraries
from next_core.settings import Settings
from next_core.sources.memory import MemorySource
from tests.crash import small_run
from tests.crash.facts import differences, facts
from tests.crash.processes import call

pytestmark = pytest.mark.trl
Attack = Callable[[History, int], Any]


def to(history: History, horizon: int, value: float = 1.0, more: int = 0, name: str | None = None) -> Prediction:
    """Low-rank updates full of one value, for one matrix by any name, or for all of them."""
    updates = {}
    for parameter in history.source.parameters:
        m, n = parameter.shape
        matrix = LowRank(torch.full((m + more, 1), value), torch.ones(n, 1).mT)
        updates[name or parameter.name] = LowRankUpdate(matrix)
    return Prediction(history.source, history.newest, horizon, updates=updates)


def secant(history: History, horizon: int, times: float, step: int | None = None, source: Any = None) -> Prediction:
    """What was done between the last two checkpoints, so many times over."""
    old, new = history.steps[-2:]
    updates = {p.name: CoefficientUpdate({new: times, old: -times}, "factors") for p in history.source.parameters}
    return Prediction(source or history.source, history.newest if step is None else step, horizon, updates=updates)


def another(history: History) -> Any:
    """A source of the same matrices, which is not the run's."""
    mine, shapes = history.source, {p.name: p.shape for p in history.source.parameters}
    checkpoints = {
        step: {name: mine.factors(name, step) or torch.zeros(shape) for name, shape in shapes.items()}
        for step in history.steps
    }
    return MemorySource(checkpoints, {name: torch.zeros(shape) for name, shape in shapes.items()})


def raising(error: BaseException) -> Attack:
    def attack(history: History, horizon: int) -> NoReturn:
        raise error

    return attack


def stubborn(history: History, horizon: int) -> NoReturn:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def without_end(history: History, horizon: int) -> Any:
    return without_end(history, horizon)


def throws_dice(history: History, horizon: int) -> Prediction:
    torch.manual_seed(12)
    torch.rand(7)
    np.random.seed(12)
    np.random.rand(7)
    random.seed(12)
    random.random()
    return declined(history, horizon)


def scribbles(history: History, horizon: int) -> Prediction:
    for parameter in history.source.parameters:
        for step in history.steps:
            for tensor in tensors_of(history, parameter.name, step):
                with torch.no_grad():
                    tensor.fill_(3.0)
    return declined(history, horizon)


def tensors_of(history: History, name: str, step: int) -> list[torch.Tensor]:
    """Every tensor that a predictor can get hold of."""
    factors, delta, position = (getattr(history.source, what)(name, step) for what in ("factors", "delta", "position"))
    found = [] if factors is None else [factors.A, factors.B]
    for value in (delta, position):
        found += [value.left, value.right] if isinstance(value, LowRank) else [value]
    start = history.source.start(name)
    return found + ([] if start is None else [start.A, start.B])


def declined(history: History, horizon: int) -> Prediction:
    return Prediction(history.source, history.newest, horizon, abstention="it did what it wanted to")


TRIED: Sequence[tuple[str, Attack, str]] = [
    ("scribbles over what it is given", scribbles, "it did what it wanted to"),
    ("NaN", lambda history, horizon: to(history, horizon, float("nan")), "not finite"),
    ("a hundred times too far", lambda history, horizon: secant(history, horizon, 100.0), "times the motion of"),
    ("other shapes", lambda history, horizon: to(history, horizon, more=1), r"not \("),
    ("unknown names", lambda history, horizon: to(history, horizon, name="nobody.weight"), "nobody.weight"),
    ("None", lambda history, horizon: None, "NoneType"),
    ("another step", lambda history, horizon: secant(history, horizon, 1.0, step=2), "from step 2, and the run is at"),
    ("another source", lambda past, horizon: secant(past, horizon, 1.0, source=another(past)), "another source"),
    ("an error", raising(ValueError("my own mistake")), "the predictor failed: ValueError: my own mistake"),
    ("an error without end", without_end, "RecursionError"),
    ("no memory", raising(MemoryError("77 GB")), "77 GB"),
    ("the end of the program", raising(SystemExit(3)), "SystemExit"),
    ("a loop that catches what it can", stubborn, "longer than time_limit, 1 s"),
    ("dice", throws_dice, "it did what it wanted to"),
]
FIRST, EVERY = 2, 1
STEPS = FIRST + EVERY * (len(TRIED) - 1) + small_run.SCHEDULE["settle"]


class AttackerConfig(Settings):
    tame: bool = False


class Attacker(TrajectoryPredictor):
    """Does one thing after the other; a tame one declines each time."""

    name = "attacker"
    config_class = AttackerConfig

    def predict(self, horizon: int) -> Prediction:
        _, attack, _ = TRIED[(self.history.newest - FIRST) // EVERY]
        made: Prediction = (declined if self.config.tame else attack)(self.history, horizon)
        return made


def attacked(raw: dict[str, Any], out: Path) -> None:
    """In a process of its own."""
    quiet_libraries()
    registry().add(Attacker)
    run(small_run.checked(raw), out)


@pytest.fixture(scope="module", params=["lora", "full"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run under attack, and left alone."""
    folder = tmp_path_factory.mktemp("attacks")
    training = {} if request.param == "lora" else {"lora": None, "learning_rate": 1e-4}
    outs = {}
    for name in ("tame", "wild"):
        raw = small_run.raw_config(
            folder / "data",
            steps=STEPS,
            save_every=10,
            predictor={"name": "attacker", "tame": name == "tame"},
            training=training,
            schedule={"observe": FIRST, "every": EVERY, "jump_every": EVERY},
            guards={"recovery": None, "time_limit": 1.0},
        )
        outs[name] = folder / name
        outcome = call(attacked, raw, outs[name])
        assert outcome.code == 0, outcome.error
    return outs


def test_each_attack_is_refused_with_its_reason(runs: dict[str, Path]) -> None:
    jumps = [record for record in read_journal(runs["wild"] / "journal.jsonl") if record["event"] == "jump"]
    tried = jumps[: len(TRIED)]
    assert [jump["step"] for jump in tried] == [FIRST + EVERY * i for i in range(len(tried))]
    told = {name: jump["reason"] for (name, _, _), jump in zip(TRIED, tried, strict=True)}
    assert not any(jump["accepted"] for jump in tried)
    wrong = {name: told[name] for name, _, reason in TRIED if not re.search(reason, told[name])}
    assert wrong == {}


def test_the_run_under_attack_is_the_run_left_alone_bit_for_bit(runs: dict[str, Path]) -> None:
    found = differences(facts(runs["wild"]), facts(runs["tame"]))
    logged = re.compile(r"(checkpoints|metrics|trainer/.*(?<!trainer_state\.json)$)")  # decisions are in that file
    assert [name for name in found if logged.match(name)] == []

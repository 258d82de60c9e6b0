"""Each check of backends is failed by what is wrong in just this; the trainer is gradient descent in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from next_core.backend import Backend
from next_core.config import make_config
from next_core.errors import GuardError
from next_core.interfaces import Applied, Prediction
from next_core.interfaces.prediction import merged, weight_delta
from next_core.mathematics.low_rank import dense
from next_core.run_config import RunConfig
from next_core.settings import Settings
from next_core.sources.memory import MemorySource
from next_core.testing import BackendCase, ContractError, check_backend, checks_of
from tests.testing.test_backends import ARITHMETIC
from tests.testing.wrong_predictors import Drifting, Hidden, Lenient, Thawed

SHAPES = {"a": (4, 3), "b": (3, 4), "c": (4, 4)}
Weights = dict[str, Tensor]


class Shifted(MemorySource):
    """Its positions are counted from the backbone, and have the jumps in them."""

    total: Mapping[str, Tensor]

    def position(self, name: str, step: int) -> Tensor:
        found = self.delta(name, step)
        assert isinstance(found, Tensor)
        return found + self.total[name].double()


class Taken(Applied):
    def __init__(self, backend: Right, step: int) -> None:
        self.backend, self.step = backend, step
        self.before = {name: value.clone() for name, value in backend.weights.items()}

    def rollback(self) -> None:
        self.backend.rollback(self, self.backend.at)


class Right(Backend):
    """W -= lr (W - goal), full parameters; ``out`` has the state of every ``save_every`` steps."""

    name = "right"
    exact_resume = True
    lr = 0.1

    def __init__(self, config: Settings | None = None) -> None:
        super().__init__(config)
        random = torch.Generator().manual_seed(0)
        self.backbone = {name: torch.randn(*shape, generator=random) for name, shape in SHAPES.items()}
        self.goal = {name: torch.randn(*shape, generator=random) for name, shape in SHAPES.items()}
        self.weights = {name: value.clone() for name, value in self.backbone.items()}
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
        self.kept[step] = {name: value.clone() for name, value in self.weights.items()}

    def shift(self, name: str, step: int) -> Tensor:
        """What a checkpoint moves by for the jumps made since."""
        moves = [move[name] for made, move in self.jumps.items() if made >= step and name in move]
        return sum(moves, torch.zeros(SHAPES[name]))

    def source(self) -> MemorySource:
        shifted = {step: {n: w + self.shift(n, step) for n, w in kept.items()} for step, kept in self.kept.items()}
        start = {name: value + self.shift(name, 0) for name, value in self.backbone.items()}
        found = Shifted(shifted, start)
        found.total = {name: self.shift(name, 0) for name in SHAPES}
        return found

    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        found = {name: weight_delta(prediction, name, alpha) for name in prediction.updates}
        moves = {name: dense(merged(by)).float() for name, by in found.items() if by is not None}
        taken = Taken(self, prediction.step)
        self.jumps[prediction.step] = moves
        self.weights = {n: w + moves[n] if n in moves else w for n, w in self.weights.items()}
        if keep:
            self.undoing[prediction.step] = taken
        return taken

    def rollback(self, applied: Applied, step: int) -> None:
        assert isinstance(applied, Taken)
        self.weights = {name: value.clone() for name, value in applied.before.items()}
        del self.jumps[applied.step]
        if step > applied.step:
            self.kept.clear()

    def active_jump(self, step: int) -> Applied | None:
        return self.undoing.get(step)

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        return math.exp(-sum(float((w - self.goal[n]).square().sum()) for n, w in self.weights.items()))


class Launched(Right):
    """The same as a trainer that is driven by segments."""

    in_process = False


class TwoWords(Right):
    name = "two words"


class DriftingSettings(Right):
    config_class = Drifting


class ThawedSettings(Right):
    config_class = Thawed


class LenientSettings(Right):
    config_class = Lenient


class HiddenSettings(Right):
    config_class = Hidden


class Starting(Right):
    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        out.mkdir()
        return {}


class FromOne(Right):
    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        return super().prepare(run, out, resume) or 1


class ClosesOnce(Right):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise ValueError("closed already")
        self.closed = True


class Stuttering(Right):
    """Reports the last step twice."""

    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        super().train(until, step_ended)
        step_ended(until)


class WithStart(Right):
    """Shows where RL began as if it had been observed."""

    def source(self) -> MemorySource:
        if len(self.kept) > 3 or self.jumps:
            return super().source()
        self.kept[0] = self.backbone
        found = super().source()
        del self.kept[0]
        return found


class WholeShifted(Shifted):
    def precision(self, name: str) -> torch.dtype:
        return torch.int64


class Imprecise(Right):
    def source(self) -> MemorySource:
        found = super().source()
        found.__class__ = WholeShifted
        return found


class Idle(Right):
    lr = 0.0


class OneNote(Right):
    @property
    def notes(self) -> Sequence[str]:
        return "a note"


class Timid(Right):
    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        return super().apply_jump(prediction, 1.0, keep)


class ShiftsOne(Right):
    """Counts a jump into the checkpoint it was made from, and into none before."""

    def shift(self, name: str, step: int) -> Tensor:
        if step == 0:
            return super().shift(name, step)
        return self.jumps.get(step, {}).get(name, torch.zeros(SHAPES[name]))


class Shaken(Right):
    """Trains on with another learning rate once a jump was taken back."""

    def rollback(self, applied: Applied, step: int) -> None:
        super().rollback(applied, step)
        self.lr = 0.05


class Remembering(Right):
    """Keeps the checkpoints of a path that was left."""

    def rollback(self, applied: Applied, step: int) -> None:
        kept = dict(self.kept)
        super().rollback(applied, step)
        self.kept = kept


class Swallowing(Right):
    def apply_jump(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        try:
            return super().apply_jump(prediction, alpha, keep)
        except GuardError:
            return Taken(self, prediction.step)


class Forgetful(Right):
    def active_jump(self, step: int) -> Applied | None:
        return None


class Percent(Right):
    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        return 50.0


class StartsOver(Right):
    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        return super().prepare(run, out)


JUMPS = {name for name in checks_of("backend") if "jump" in name}
WRONG: dict[str, tuple[type[Right], set[str]]] = {
    "has_a_name": (TwoWords, set()),
    "settings_survive_a_round_trip": (DriftingSettings, set()),
    "settings_are_frozen": (ThawedSettings, set()),
    "settings_refuse_what_they_do_not_know": (LenientSettings, set()),
    "settings_have_a_json_schema": (HiddenSettings, set()),
    "describes_without_starting": (Starting, set()),
    "prepares_a_new_run_at_step_zero": (FromOne, set()),
    "closes_at_any_time": (ClosesOnce, set()),
    "reports_the_steps": (Stuttering, {"observing_makes_a_step_visible", "resumes_where_it_was_saved"}),
    "observing_makes_a_step_visible": (WithStart, {"a_jump_can_be_taken_back_later"}),
    "its_source_is_a_good_one": (Imprecise, set()),
    "training_moves_the_weights": (Idle, JUMPS | {"its_source_is_a_good_one"}),
    "notes_are_texts": (OneNote, set()),
    "a_jump_lands_and_training_goes_on": (Timid, set()),
    "the_history_shows_rl_and_not_the_jump": (ShiftsOne, set()),
    "a_jump_taken_back_at_once_never_was": (Shaken, set()),
    "a_jump_can_be_taken_back_later": (Remembering, set()),
    "a_bad_jump_changes_nothing": (Swallowing, set()),
    "standing_jumps_are_found_where_they_were_kept": (Forgetful, set()),
    "accuracies_are_shares": (Percent, set()),
    "resumes_where_it_was_saved": (StartsOver, set()),
}


@pytest.fixture
def run() -> RunConfig:
    """Its steps are what counts."""
    data = {"train": ARITHMETIC / "train.jsonl"}
    schedule = {"observe": 2, "every": 1, "horizon": 1, "jump_every": 1}
    raw = {"steps": 5, "save_every": 2, "predictor": "secant", "schedule": schedule}
    return make_config(raw | {"training": {"model": ARITHMETIC / "base", "data": data}})


@pytest.mark.parametrize("cls", [Right, Launched])
def test_what_is_right_passes(cls: type[Right], run: RunConfig, tmp_path: Path) -> None:
    check_backend(BackendCase(cls(), run, tmp_path))


@pytest.mark.parametrize("name", checks_of("backend"))
def test_what_is_wrong_in_one_thing_fails_its_check_and_no_other(name: str, run: RunConfig, tmp_path: Path) -> None:
    cls, besides = WRONG[name]
    with pytest.raises(ContractError) as caught:
        check_backend(BackendCase(cls(), run, tmp_path))
    assert name in caught.value.failed
    assert set(caught.value.failed) - {name} <= besides

"""Step scaling in the cycle: what is journalled, refused and undone, and the mean at the end."""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from next_core.backend import LoggedReward
from next_core.cycle.journal import Journal, read_journal
from next_core.cycle.loop import PredictExtendCycle
from next_core.cycle.scaling import scaling_records
from next_core.run_config import Guards, Schedule
from next_core.settings import Settings
from next_core.step_predictor import StepConfig, StepHistory, StepPredictor, StepScale
from tests.cycle.descent import Descent
from tests.errors import raises_kind


class Given(StepPredictor):
    """Returns what a function of the history returns."""

    name = "given"
    config_class = StepConfig

    def __init__(self, act: Callable[[StepHistory], Any], block: int = 2) -> None:
        super().__init__(StepConfig(block=block))
        self.act = act

    def predict(self, history: StepHistory) -> StepScale:
        found: StepScale = self.act(history)
        return found


def cycle(
    backend: Descent, act: Callable[[StepHistory], Any], total: int = 8, average: int | None = None, **more: Any
) -> PredictExtendCycle:
    block = more.pop("block", 2)
    schedule, guards = Schedule(observe=1, every=1, average=average), more.pop("guards", Guards(probe=False))
    return PredictExtendCycle(backend, lambda: Given(act, block), schedule, guards, total, Journal(), **more)


def doubled(history: StepHistory) -> StepScale:
    return StepScale(2 * history.multiple, {"agreement": history.cosine(1) or 0.0})


def test_each_block_multiplies_the_steps_that_follow_and_takes_no_checkpoint() -> None:
    backend = Descent(lr=0.01)
    made = cycle(backend, doubled)
    losses: list[float] = []
    assert made.run(lambda step: losses.append(backend.loss)) == 8
    rates = [0.01 * 2 ** (step // 2) for step in range(8)]
    factors = [math.sqrt(after / before) for before, after in itertools.pairwise(losses)]
    assert factors == pytest.approx([1 - rate for rate in rates[1:]], rel=1e-4)
    assert not backend.checkpoints
    records = scaling_records(made.journal)
    assert [(r["step"], r["multiple"], r["rate"]) for r in records] == [
        (step, 2.0**block, pytest.approx(0.01 * 2**block)) for block, step in enumerate((2, 4, 6, 8), start=1)
    ]
    assert records[1]["diagnostics"]["agreement"] == pytest.approx(1.0)  # gradient descent on a parabola is straight
    assert made.journal.jumps() == []


def test_whether_the_rate_was_found_may_be_a_tensor(tmp_path: Path) -> None:
    made = cycle(Descent(), lambda history: StepScale(1.0, found=torch.tensor(True)), total=2)
    made.journal.path = tmp_path / "journal.jsonl"
    made.run()
    assert [record["found"] for record in read_journal(made.journal.path)] == [True]


def test_what_the_processes_add_up_is_outside_the_predictors_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Descent(lr=0.01)
    made = cycle(backend, doubled, total=2, guards=Guards(probe=False, time_limit=0.5))
    products = backend.steps.products
    monkeypatch.setattr(backend.steps, "products", lambda: (time.sleep(0.6), products())[1])
    made.run()
    assert [record["accepted"] for record in scaling_records(made.journal)] == [True]


def fails(history: StepHistory) -> Any:
    raise ZeroDivisionError("oh")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (fails, "ZeroDivisionError"),
        (lambda history: 2.0, "float"),
        (lambda history: StepScale(math.nan), "nan"),
        (lambda history: StepScale(math.inf), "inf"),
        (lambda history: StepScale(0.0), "0"),
        (lambda history: StepScale(2.0, {"phase": "rising"}), "ValueError"),
        (lambda history: StepScale(2.0, None), "AttributeError"),
        (lambda history: StepScale(1.0, {}, restart=history.step == 30), "not kept"),
    ],
)
def test_a_prediction_that_cannot_be_used_changes_nothing_and_is_journalled(act: Any, reason: str) -> None:
    plain, backend = Descent(), Descent()
    plain.train(30, lambda step: None)
    made = cycle(backend, act, total=30)
    made.run()
    assert torch.equal(backend.model.weight, plain.model.weight)
    last = scaling_records(made.journal)[-1]
    assert not last["accepted"]
    assert reason in last["reason"]
    with raises_kind("guard-refused", "step "):
        cycle(Descent(), act, total=30, strict=True).run()


def test_a_predictor_knows_whether_the_first_weights_can_be_returned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, seen = Descent(), dict[int, bool]()
    monkeypatch.setattr(backend, "takes_weights", lambda step: step != 4)

    def look(history: StepHistory) -> StepScale:
        seen[history.step] = history.can_restart
        return StepScale(1.0)

    cycle(backend, look, total=24).run()
    assert seen == {step: step != 4 and step <= 20 for step in range(2, 25, 2)}


def collapsing(backend: Descent, made: PredictExtendCycle, after: int, times: int = 1) -> Callable[[int], None]:
    """Log a reward of .5 each step, and of 0 after step ``after`` until it was undone ``times`` times."""

    def log(step: int) -> None:
        undone = sum(record["event"] == "collapse" for record in scaling_records(made.journal))
        backend.logged.append(LoggedReward(step, 1, 0.5 if step <= after or undone >= times else 0.0, 0.06))

    return log


def test_a_collapse_returns_to_the_last_good_weights_with_smaller_steps() -> None:
    backend, seen = Descent(), dict[int, Any]()
    made = cycle(backend, lambda history: StepScale(8.0), total=40)
    log = collapsing(backend, made, after=25)

    def watch(step: int) -> None:
        seen[step] = backend.model.weight.detach().clone()
        log(step)

    made.run(watch)
    [collapse] = [record for record in scaling_records(made.journal) if record["event"] == "collapse"]
    assert 25 < collapse["step"] <= 31
    assert collapse["back_to"] in (10, 20)
    assert torch.equal(seen[collapse["step"]], seen[collapse["back_to"]])
    assert (collapse["multiple_before"], collapse["multiple"]) == (8.0, 4.0)
    assert collapse["reward"] < 0.75 * collapse["best"] == 0.75 * 0.5


def test_a_state_of_steps_whose_reward_had_fallen_is_not_returned_to() -> None:
    """A rare reward needs some steps to be missed: a state of these is as damaged as the weights now."""
    backend = Descent()
    made = cycle(backend, lambda history: StepScale(1.0), total=60)

    def log(step: int) -> None:
        undone = any(record["event"] == "collapse" for record in scaling_records(made.journal))
        if step % 5 == 0:
            earns = step == 5 or undone
            backend.logged.append(LoggedReward(step, 5, 0.0063, 0.0014) if earns else LoggedReward(step, 5, 0.0, 0.0))

    made.run(log)
    [collapse] = [record for record in scaling_records(made.journal) if record["event"] == "collapse"]
    assert collapse["step"] > 10
    assert collapse["back_to"] == 0
    assert (collapse["multiple_before"], collapse["multiple"]) == (1.0, 0.1)


def test_a_state_whose_reward_fell_too_slowly_to_be_noticed_is_not_returned_to() -> None:
    """The fall is so noisy that states are kept on the way down."""
    backend = Descent()
    made = cycle(backend, lambda history: StepScale(1.0), total=200)

    def log(step: int) -> None:
        undone = any(record["event"] == "collapse" for record in scaling_records(made.journal))
        mean = 0.02 if step <= 15 or undone else 0.002 * (step <= 70 and step % 10 == 0)
        if step % 5 == 0:
            backend.logged.append(LoggedReward(step, 5, mean, math.sqrt(mean / 640)))

    made.run(log)
    collapse = next(record for record in scaling_records(made.journal) if record["event"] == "collapse")
    assert collapse["step"] > 30
    assert collapse["back_to"] <= 10


def test_a_state_that_led_to_a_collapse_twice_is_not_returned_to_again() -> None:
    backend = Descent()
    made = cycle(backend, lambda history: StepScale(1.0), total=60)
    made.run(collapsing(backend, made, after=25, times=2))
    back = [record["back_to"] for record in scaling_records(made.journal) if record["event"] == "collapse"]
    assert len(back) == 2
    assert back[1] < back[0] or back == [10, 10]


def test_without_the_guard_nothing_is_undone() -> None:
    backend = Descent()
    made = cycle(backend, lambda history: StepScale(1.0), total=40, guards=Guards(probe=False, collapse=False))
    made.run(collapsing(backend, made, after=25))
    assert all(record["event"] == "scale" for record in scaling_records(made.journal))


@pytest.mark.parametrize("better", [True, False])
def test_the_run_ends_in_a_mean_only_if_it_validates_better(better: bool) -> None:
    backend = Descent(accuracy=lambda loss: loss / 100 if better else -loss)  # an early mean has the larger loss
    plain = Descent()
    plain.train(20, lambda step: None)
    made = cycle(backend, lambda history: StepScale(1.0), total=20, average=8)
    made.run()
    record = made.journal.records[-1]
    assert (record["event"], record["accepted"]) == ("average", better)
    assert list(record["tried"]) == ["2", "4", "8"]
    assert torch.equal(backend.model.weight, plain.model.weight) is not better


def test_a_backend_that_cannot_reach_the_optimizer_refuses_before_training() -> None:
    class Far(Descent):
        name = "far"

        def follow_steps(self, windows: Any) -> None:
            super(Descent, self).follow_steps(windows)

    with raises_kind("backend-unsupported", "'far'"):
        cycle(Far(), doubled)


@pytest.mark.parametrize(("rate", "ends_in_mean"), [(1.5, True), (0.01, False)])
def test_without_accuracy_the_run_ends_in_a_mean_where_motions_cancel(rate: float, ends_in_mean: bool) -> None:
    class Unmeasured(Descent):
        def evaluate(self, split: Any = "validation") -> float | None:
            return None

    backend = Unmeasured(lr=rate)  # beyond 1, gradient descent oscillates around the optimum
    made = cycle(backend, lambda history: StepScale(1.0), total=10, average=8, block=5)
    made.run()
    record = made.journal.records[-1]
    assert (record["event"], record["accepted"]) == ("average", ends_in_mean)
    assert ("the mean of the last 4 steps" in record["reason"]) is ends_in_mean


def test_a_step_predictor_needs_settings_with_a_block() -> None:
    with pytest.raises(TypeError, match="StepConfig"):
        type("WithoutBlock", (Given,), {"config_class": Settings})

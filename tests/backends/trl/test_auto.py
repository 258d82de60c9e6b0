"""``auto`` in a real trainer: it scales steps, and by another name it jumps. A resumed run ends alike, bit for bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from next_backends.trl import PredictExtendCallback
from tests.backends.trl.conftest import Watch
from tests.errors import raises_kind

pytestmark = pytest.mark.trl
SCALING = ("scale", "collapse")


def test_roll_outs_that_serve_several_steps_count_once_in_the_error_of_a_reward(make_trainer: Any) -> None:
    callback = PredictExtendCallback({"name": "step-scale", "restart": False}, every=2, average=None)
    assert callback.schedule.every == 2
    trainer = make_trainer([callback], steps=5, num_iterations=4, logging_steps=1)
    trainer.train()
    last = callback.backend.rewards()[-1]
    spread = {logs["step"]: logs["reward_std"] for logs in trainer.state.log_history if "reward_std" in logs}[5]
    assert (last.step, last.steps) == (5, 4)
    assert last.error == pytest.approx(spread / math.sqrt(8))
    assert spread > 0


def scaling(callback: PredictExtendCallback) -> list[dict[str, Any]]:
    return [record for record in callback.journal.counted() if record["event"] in SCALING]


def multiples(callback: PredictExtendCallback) -> dict[int, float]:
    return {jump["step"]: jump["diagnostics"]["multiple"] for jump in callback.journal.jumps()}


def same_weights(trained: Any, one: Any, other: Any) -> bool:
    mine = trained(one.model)
    return all(torch.equal(value, mine[name]) for name, value in trained(other.model).items())


def test_it_raises_a_rate_that_is_too_small_and_a_resumed_run_ends_alike(make_trainer: Any, trained: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 13, "learning_rate": 1e-5, "logging_steps": 1}
    first = PredictExtendCallback("auto", evaluate=lambda model: float(next(model.parameters()).sum()), average=40)
    whole = make_trainer([first], steps=25, **saving)
    whole.train()
    found = scaling(first)
    assert [record["step"] for record in found] == [5, 10, 15, 20, 25]
    assert found[-1]["multiple"] > 2
    assert found[-1]["rate"] == pytest.approx(1e-5 * found[-1]["multiple"])
    assert not (Path(whole.args.output_dir) / "next-core" / "checkpoints").exists()
    assert whole.optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)

    again = PredictExtendCallback("auto", evaluate=lambda model: float(next(model.parameters()).sum()), average=40)
    resumed = make_trainer([again], steps=25, **saving)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-13"))
    assert scaling(again) == found
    assert same_weights(trained, whole, resumed)

    (Path(whole.args.output_dir) / "checkpoint-13" / "next-core.safetensors").unlink()
    late = make_trainer([PredictExtendCallback("auto")], steps=25, **saving)
    with raises_kind("checkpoint-no-history", "next-core.safetensors"):
        late.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-13"))


def test_a_resumed_run_returns_to_the_states_that_are_left_or_to_that_step_and_says_so(make_trainer: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 7}
    whole = make_trainer([PredictExtendCallback("auto")], steps=22, **saving)
    whole.train()
    kept = Path(whole.args.output_dir) / "next-core" / "kept"
    assert sorted(path.name for path in kept.iterdir()) == [f"step-{at:06d}-0.safetensors" for at in (0, 10, 20)]
    for step, lost, left in ((21, 99, [0, 10, 20]), (14, 10, [0, 15]), (7, 0, [7])):
        (kept / f"step-{lost:06d}-0.safetensors").unlink(missing_ok=True)
        again, kept_then = PredictExtendCallback("auto"), list[list[int]]()

        def look(at: int, model: Any, backend: Any = again.backend, seen: list[list[int]] = kept_then) -> None:
            seen.append(list(backend.steps.kept))

        resumed = make_trainer([again, Watch(look)], steps=22)
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
        assert kept_then[0] == left
        assert [f"step {left[0]}" in note for note in again.backend.notes] == [True] * (step < 21)


def test_far_too_large_steps_are_undone_to_the_first_weights_and_moments(make_trainer: Any, trained: Any) -> None:
    large = PredictExtendCallback({"name": "step-scale", "block": 2})
    trainer = make_trainer([large], steps=4, learning_rate=0.01)
    start = trained(trainer.model)
    trainer.train()
    assert scaling(large)[-1]["back_to"] == 0
    assert scaling(large)[-1]["multiple"] == 0.25
    assert all(torch.equal(value, start[name]) for name, value in trained(trainer.model).items())
    assert not any(trainer.optimizer.state.values())


@pytest.mark.parametrize("lora", [True, False])
def test_a_multiple_of_one_leaves_a_plain_run_bit_for_bit(make_trainer: Any, trained: Any, lora: bool) -> None:
    still = {"name": "step-scale", "target": -0.99, "gain": 1e-300, "restart": False, "block": 3}
    plain = make_trainer(steps=7, lora=lora, out="plain")
    plain.train()
    scaled = make_trainer([PredictExtendCallback(still, average=None)], steps=7, lora=lora)
    scaled.train()
    assert same_weights(trained, plain, scaled)


def test_settings_of_jumps_are_refused(tmp_path: Path) -> None:
    with raises_kind("config-contradiction", "schedule.settle", "guards.recovery", "adaptive-secant"):
        PredictExtendCallback("auto", settle=2, guards={"recovery": 5})


def test_jumps_need_no_setting_either_and_survive_a_resume(make_trainer: Any, trained: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 26}
    first = PredictExtendCallback("adaptive-secant", settle=2)
    whole = make_trainer([first], steps=34, **saving)
    whole.train()
    found = multiples(first)
    assert sorted(found) == list(range(20, 34, 2))
    assert found[20] > 1.02  # the first steps of this base go straight on
    assert found[22] == found[28] == found[20]  # measured every 10 steps
    assert any(jump["accepted"] for jump in first.journal.jumps())

    again = PredictExtendCallback("adaptive-secant", settle=2)
    resumed = make_trainer([again], steps=34, **saving)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-26"))
    assert multiples(again) == found
    assert same_weights(trained, whole, resumed)


def test_a_half_precision_adapter_trains_with_a_warning(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback = PredictExtendCallback("auto")
    trainer = make_trainer([callback], steps=1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    trainer.train()
    assert "bfloat16" in callback.backend.notes[0]
    assert "float32" in caplog.text

"""What the trainer is asked, and when, with `jump: swap` and `jump: restart`; the trainer is a pretended one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from next_backends.openrlhf.openrlhf_backend import OpenRlhfBackend
from next_backends.openrlhf.pausing import Pausing
from next_core.errors import BackendError
from tests.backends.openrlhf.pretending import Pretence

B = "base_model.model.layer.lora_B.weight"
RESTART = {"jump": "restart"}


@pytest.fixture
def pretence(tmp_path: Path) -> Iterator[Pretence]:
    with Pretence(tmp_path) as made:
        yield made


def made(pretence: Pretence, plan: dict[str, Any] | None = None, **changes: Any) -> Pausing:
    return pretence.begun(Pausing(pretence.setting(plan, **changes)))


def started(pretence: Pretence, plan: dict[str, Any] | None = None, **changes: Any) -> Pausing:
    way = made(pretence, plan, **changes)
    way.start()
    return way


def kill(pretence: Pretence) -> None:
    """The trainer dies, as of a lack of memory."""
    os.kill(pretence.asked()[-1]["pid"], signal.SIGKILL)


def test_a_trainer_pauses_where_it_is_told(pretence: Pretence) -> None:
    way = made(pretence)
    assert way.resume({3, 4, 5}) == 0
    assert pretence.asked() == []
    way.start()
    before = pretence.observe(way, 0)
    way.train(1)
    way.train(3)
    assert [request["until"] for request in pretence.asked("train")] == [1, 3]
    assert len(pretence.asked("start")) == 1
    torch.testing.assert_close(pretence.observe(way, 3)[B], before[B] + 0.03)
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3]
    (start,) = pretence.asked("start")
    assert start["hooks"] == ["control", "lora"]
    control = start["control"]
    assert (control["start"], control["seed"], control["scheduler_steps"]) == (0, 0, 6)


def test_a_full_parameter_run_has_no_lora_hook(pretence: Pretence) -> None:
    started(pretence, training={"lora": None}).train(1)
    assert pretence.asked("start")[0]["hooks"] == ["control"]


def test_swap_loads_the_checkpoint_with_the_shift_and_goes_on(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    before = pretence.observe(way, 3)
    folder = pretence.jump(way, 3)
    (load,) = pretence.asked("load")
    assert load["folder"] == str(pretence.out / "checkpoints" / "step-000003")
    assert load["shifts"] == [str(folder / "shift.safetensors")]
    assert (load["beside"], load["moments"], load["schedule"]) == ([], None, None)
    way.train(4)
    torch.testing.assert_close(pretence.observe(way, 4)[B], before[B] + 1 / 6**0.5 + 0.01)
    assert len(pretence.asked("start")) == 1


def test_swap_lets_a_jump_beside_the_adapter_stand_with_those_before_it(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    pretence.observe(way, 3)
    first = pretence.jump(way, 3, length=0.0, adapter=True)
    way.train(4)
    pretence.observe(way, 4)
    second = pretence.jump(way, 4, length=0.0, adapter=True)
    assert [load["beside"] for load in pretence.asked("load")] == [
        [str(first / "adapter")],
        [str(first / "adapter"), str(second / "adapter")],
    ]
    assert [load["shifts"] for load in pretence.asked("load")] == [[], []]


def test_taken_back_at_once_the_trainer_has_its_checkpoint_again(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    before = pretence.observe(way, 3)
    folder = pretence.jump(way, 3, keep=True)
    pretence.setting().history.withdraw(folder, 3)
    way.take_back(3, 3, folder)
    load = pretence.asked("load")[-1]
    assert (load["shifts"], load["beside"], load["moments"]) == ([], [], None)
    way.train(4)
    torch.testing.assert_close(pretence.observe(way, 4)[B], before[B] + 0.01)


def test_taken_back_later_the_moments_come_back_too(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    before = pretence.observe(way, 3)
    folder = pretence.jump(way, 3, keep=True)
    assert way.rollback_is_kept(folder)
    way.train(5)
    pretence.setting().history.withdraw(folder, 5)
    way.take_back(3, 5, folder)
    load = pretence.asked("load")[-1]
    assert load["folder"].endswith("step-000003")
    assert load["moments"] == str(folder / "moments.safetensors")
    assert (load["shifts"], load["beside"]) == ([], [])
    way.train(6)
    torch.testing.assert_close(pretence.observe(way, 6)[B], before[B] + 0.01)


def test_a_jump_whose_undoing_was_not_kept_says_so(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    pretence.observe(way, 3)
    assert not way.rollback_is_kept(pretence.jump(way, 3))
    assert pretence.asked("save_moments") == []


def test_restart_ends_the_trainer_and_a_new_one_begins_where_the_run_is(pretence: Pretence) -> None:
    way = started(pretence, backend=RESTART)
    way.train(3)
    before = pretence.observe(way, 3)
    folder = pretence.jump(way, 3)
    old, new = pretence.asked("start")
    assert old["pid"] != new["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(old["pid"], 0)
    assert (new["control"]["start"], new["control"]["seed"], new["options"]["--train.seed"]) == (3, 3, "3")
    assert new["options"]["--ckpt.path"] == str(pretence.out / "trainer" / "ckpt-000003")
    assert "--ckpt.load_enable" not in new["options"]
    (load,) = pretence.asked("load")
    assert load["pid"] == new["pid"]
    assert (load["shifts"], load["schedule"]) == ([str(folder / "shift.safetensors")], 3)
    way.train(4)
    torch.testing.assert_close(pretence.observe(way, 4)[B], before[B] + 1 / 6**0.5 + 0.01)
    first = json.loads((pretence.out / "trainer" / "prompts.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "6+1="  # three steps of two prompts were before it


def test_a_restarted_trainers_schedule_counts_optimizer_steps(pretence: Pretence) -> None:
    setting = pretence.setting(backend=RESTART)
    setting.updates = 2
    way = pretence.begun(Pausing(setting))
    way.start()
    way.train(3)
    pretence.observe(way, 3)
    pretence.jump(way, 3)
    assert pretence.asked("load")[0]["schedule"] == 6
    assert pretence.asked("start")[0]["control"]["scheduler_steps"] == 12


@pytest.mark.parametrize("jump", ["swap", "restart"])
def test_resume_takes_up_the_newest_state(pretence: Pretence, jump: str) -> None:
    way = started(pretence, backend={"jump": jump})
    way.train(5)
    weights = pretence.observe(way, 5)
    kill(pretence)
    way.close()
    way = made(pretence, backend={"jump": jump})
    assert way.resume({3, 4, 5}) == 4
    way.start()
    assert not (pretence.out / "checkpoints" / "step-000005").exists()
    way.train(5)
    start = pretence.asked("start")[-1]
    assert "--ckpt.load_enable" in start["options"]
    assert start["control"]["start"] == 0  # it counts on from its own state
    (load,) = pretence.asked("load")
    assert (load["folder"], load["shifts"], load["beside"]) == (None, [], [])
    torch.testing.assert_close(pretence.observe(way, 5)[B], weights[B])


def test_swap_resumes_at_a_state_that_has_the_jump_in_it(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(4)
    pretence.observe(way, 4)
    folder = pretence.jump(way, 4, adapter=True)
    way.train(5)  # what it keeps of step 4 holds the jump
    weights = pretence.observe(way, 5)
    kill(pretence)
    way.close()
    way = made(pretence)
    assert way.resume({3, 4, 5}) == 4
    way.start()
    assert folder.exists()
    way.train(5)
    load = pretence.asked("load")[-1]
    assert (load["folder"], load["shifts"], load["beside"]) == (None, [], [str(folder / "adapter")])
    torch.testing.assert_close(pretence.observe(way, 5)[B], weights[B])


def test_a_jump_after_the_state_that_is_resumed_is_forgotten(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(5)
    pretence.observe(way, 5)
    folder = pretence.jump(way, 5)
    kill(pretence)
    way.close()
    way = made(pretence)
    assert way.resume({3, 4, 5}) == 4
    way.start()
    assert not folder.exists()


def test_a_trainer_that_takes_up_another_step_is_refused(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    way.close()
    way = made(pretence, {"takes_up": 1})
    assert way.resume({3, 4, 5}) == 2
    with pytest.raises(BackendError, match="took up step 1, not 2"):
        way.start()


@pytest.mark.parametrize("what", ["save", "load", "train"])
def test_a_trainer_that_dies_in_a_request_is_told_with_its_last_lines(pretence: Pretence, what: str) -> None:
    way = started(pretence, {"dies_in": what})
    before = time.monotonic()
    with pytest.raises(BackendError, match=r"(?s)the trainer ended while it was needed, with status 1; .*as it were"):
        if what == "train":
            way.train(1)
        else:
            pretence.observe(way, 0)
            pretence.jump(way, 0)
    assert time.monotonic() - before < 10


def test_a_trainer_that_dies_in_a_step_is_told_with_its_last_lines(pretence: Pretence) -> None:
    way = started(pretence, {"dies_in_step": 2})
    with pytest.raises(BackendError, match=r"(?s)status 1.*trainer\.log.*\nout of luck"):
        way.train(3)
    assert [record["step"] for record in pretence.metrics()] == [1]


def test_a_trainer_that_does_not_start_is_told_with_its_last_lines(pretence: Pretence) -> None:
    way = made(pretence, {"does_not_start_at": 0})
    with pytest.raises(BackendError, match="no such device"):
        way.start()
    with pytest.raises(BackendError, match="no trainer runs"):
        way.train(1)


def test_what_a_trainer_cannot_do_is_told_and_it_goes_on(pretence: Pretence) -> None:
    way = started(pretence, {"cannot": ["save_moments"]})
    way.train(3)
    pretence.observe(way, 3)
    with pytest.raises(BackendError, match="could not save moments: ValueError: no such thing"):
        pretence.jump(way, 3, keep=True)
    assert list(pretence.out.glob("jumps/*")) == []
    way.train(4)


def test_a_trainer_that_pauses_elsewhere_is_an_error(pretence: Pretence) -> None:
    way = started(pretence, {"miscounts": 1})
    with pytest.raises(BackendError, match="paused after step 3, not 2"):
        way.train(2)


@pytest.mark.parametrize("step", [1, 4])
def test_engines_that_sample_from_other_weights_right_after_a_load_end_the_run(pretence: Pretence, step: int) -> None:
    way = started(pretence, {"kl": {str(step): -0.4}})
    with pytest.raises(BackendError, match=rf"step {step}: .* vllm_kl -0\.4, bound 0\.03.*raise backend\.max_vllm_kl"):
        way.train(3)
        pretence.observe(way, 3)
        pretence.jump(way, 3)
        way.train(5)
    assert [record["step"] for record in pretence.metrics()] == list(range(1, step + 1))


def test_later_the_engines_may_drift(pretence: Pretence) -> None:
    started(pretence, {"kl": {"3": 0.4}}).train(4)


@pytest.mark.parametrize("bound", [0.5, None])
def test_the_bound_can_be_raised_or_left_out(pretence: Pretence, bound: float | None) -> None:
    started(pretence, {"kl": {"1": 0.4}}, backend={"max_vllm_kl": bound}).train(2)


def test_a_run_that_is_over_ends_by_itself(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(6)
    way.close()
    assert pretence.asked()[-1]["do"] == "stop"
    assert (pretence.out / "trainer" / "final" / "tokenizer_config.json").exists()
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3, 4, 5, 6]
    way.close()


def test_a_run_that_is_not_over_is_ended(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(5)
    way.close()
    assert pretence.asked()[-1]["do"] == "train"
    assert not (pretence.out / "trainer" / "final").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pretence.asked()[-1]["pid"], 0)


def test_old_models_are_removed_as_training_goes_on(pretence: Pretence) -> None:
    way = started(pretence, backend={"save_hf": True, "keep_hf": 1}, save_every=1)
    for step in range(1, 6):
        way.train(step)
    assert [path.name for path in (pretence.out / "trainer" / "ckpt-000000").glob("*_hf")] == ["global_step4_hf"]


def test_accuracy_is_measured_where_there_are_prompts(pretence: Pretence) -> None:
    way = started(pretence)
    assert way.evaluate("validation") == 0.25
    assert way.evaluate("test") == 0.25
    assert pretence.asked("likelihood")[0]["pairs"][0] == ["0+1=", "1"]
    bare = {"data": {"train": pretence.setting().run.training.data.train}}
    assert started(pretence, training=bare).evaluate("validation") is None


@pytest.mark.parametrize(("evaluation", "kind"), [("likelihood", "sampled"), ("generate", "greedy")])
def test_accuracies_are_named_by_the_way_of_answering(evaluation: str, kind: str, pretence: Pretence) -> None:
    setting = pretence.setting(training={"evaluation": evaluation})
    backend = OpenRlhfBackend(setting.config)
    backend._setting, found = setting, iter([0.5, None])
    backend._mode = SimpleNamespace(evaluate=lambda split: next(found))  # type: ignore[assignment]
    assert backend.accuracies("test") == {kind: 0.5}
    assert backend.accuracies("test") == {}


def test_generated_answers_are_rewarded_while_the_trainer_waits(pretence: Pretence) -> None:
    setting = pretence.setting(training={"evaluation": "generate"})
    setting.serve_rewards()
    way = pretence.begun(Pausing(setting))
    way.start()
    assert way.evaluate("validation") == 0.0  # it always says 7
    (pretence.out.parent / "validation.jsonl").write_text('{"prompt": "6+1=", "answer": "7"}\n')
    other = pretence.setting(training={"evaluation": "generate"})
    other.serve_rewards()
    way = pretence.begun(Pausing(other))
    way.start()
    assert way.evaluate("validation") == 1.0


def no_reward(**_: Any) -> list[float]:
    raise LookupError("no reward for that")


def test_a_probe_that_failed_here_does_not_mix_up_the_answers(pretence: Pretence) -> None:
    """The cycle takes any error of a probe for an accuracy that cannot be measured, and goes on."""
    setting = pretence.setting(training={"evaluation": "generate", "reward": f"{__name__}:no_reward"})
    setting.serve_rewards()
    way = pretence.begun(Pausing(setting))
    way.start()
    with pytest.raises(BackendError, match="the reward failed: LookupError: no reward for that"):
        way.evaluate("validation")
    way.train(1)
    pretence.observe(way, 1)


def test_after_a_restart_that_failed_there_is_no_trainer_and_none_begins_elsewhere(pretence: Pretence) -> None:
    way = started(pretence, {"does_not_start_at": 3}, backend=RESTART)
    way.train(3)
    pretence.observe(way, 3)
    with pytest.raises(BackendError, match="no such device"):
        pretence.jump(way, 3)
    with pytest.raises(BackendError, match="no trainer runs"):
        way.take_back(3, 3, pretence.out / "jumps" / "0001")
    assert [start["control"]["start"] for start in pretence.asked("start")] == [0, 3]
    way.close()


def test_a_resumed_run_does_not_log_the_steps_before_it_again(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(5)
    kill(pretence)
    way.close()
    way = made(pretence)
    assert way.resume({3, 4, 5}) == 4
    way.start()
    way.train(6)
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3, 4, 5, 5, 6]


def test_restart_resumes_at_its_newest_jump_before_the_new_trainers_first_state(pretence: Pretence) -> None:
    way = started(pretence, backend=RESTART)
    way.train(3)
    before = pretence.observe(way, 3)
    folder = pretence.jump(way, 3)
    way.abandon()
    way = made(pretence, backend=RESTART)
    assert way.resume({3}) == 3
    way.start()
    start, load = pretence.asked("start")[-1], pretence.asked("load")[-1]
    assert "--ckpt.load_enable" not in start["options"]
    assert start["control"]["start"] == 3
    assert (load["shifts"], load["schedule"]) == ([str(folder / "shift.safetensors")], 3)
    way.train(4)
    torch.testing.assert_close(pretence.observe(way, 4)[B], before[B] + 1 / 6**0.5 + 0.01)


def test_restart_does_not_resume_at_a_jump_that_the_run_does_not_know_of(pretence: Pretence) -> None:
    way = started(pretence, backend=RESTART)
    way.train(3)
    pretence.observe(way, 3)
    folder = pretence.jump(way, 3)
    way.abandon()
    way = made(pretence, backend=RESTART)
    assert way.resume(set()) == 2
    assert not folder.exists()


def test_an_abandoned_trainer_is_ended(pretence: Pretence) -> None:
    way = started(pretence)
    way.abandon()
    with pytest.raises(BackendError, match="no trainer runs"):
        way.train(1)
    with pytest.raises(ProcessLookupError):
        os.kill(pretence.asked("start")[0]["pid"], 0)

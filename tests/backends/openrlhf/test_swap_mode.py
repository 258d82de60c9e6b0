"""What trainers are asked, and when, with ``jump: swap`` and ``jump: restart``; the trainer is a pretended one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from next_backends.openrlhf.openrlhf_backend import OpenRlhfBackend
from tests.backends.openrlhf.pretence import Pretence
from tests.errors import raises_kind

B = "base_model.model.layer.lora_B.weight"
LENGTH = 1 / 6**0.5
"""By which a jump moves each number of B."""


def test_a_trainer_pauses_after_the_steps_it_is_given(pretence: Pretence) -> None:
    mode = pretence.mode()
    assert mode.resume({3, 4, 5}) == 0
    assert pretence.asked() == []
    mode.start()
    before = pretence.observe(mode, 0)
    mode.train(1)
    mode.train(3)
    assert [request["until"] for request in pretence.asked("train")] == [1, 3]
    torch.testing.assert_close(pretence.observe(mode, 3)[B], before[B] + 0.03)
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3]
    (start,) = pretence.asked("start")
    assert start["hooks"] == ["control", "lora"]
    control = start["control"]
    assert (control["start"], control["seed"], control["scheduler_steps"]) == (0, 0, 6)


def test_swap_loads_checkpoint_and_shift_into_the_running_trainer(pretence: Pretence) -> None:
    mode = pretence.started()
    mode.train(3)
    before = pretence.observe(mode, 3)
    folder = pretence.jump(mode, 3)
    (load,) = pretence.asked("load")
    assert load["folder"] == str(pretence.out / "checkpoints" / "step-000003")
    assert load["shifts"] == [str(folder / "shift.safetensors")]
    assert (load["adapters"], load["moments"], load["schedule"]) == ([], None, None)
    mode.train(4)
    torch.testing.assert_close(pretence.observe(mode, 4)[B], before[B] + LENGTH + 0.01)
    assert len(pretence.asked("start")) == 1
    assert pretence.asked("save_moments") == []
    assert not mode.can_roll_back(folder)


def test_frozen_adapters_of_all_active_jumps_are_loaded(pretence: Pretence) -> None:
    mode = pretence.started()
    jumps = []
    for step in (3, 4):
        mode.train(step)
        pretence.observe(mode, step)
        jumps.append(str(pretence.jump(mode, step, length=0.0, adapter=True) / "adapter"))
    assert [load["adapters"] for load in pretence.asked("load")] == [jumps[:1], jumps]
    assert [load["shifts"] for load in pretence.asked("load")] == [[], []]


@pytest.mark.parametrize("later", [0, 2])
def test_a_rollback_restores_the_checkpoint_and_later_the_moments_too(pretence: Pretence, later: int) -> None:
    mode = pretence.started()
    mode.train(3)
    before = pretence.observe(mode, 3)
    folder = pretence.jump(mode, 3, keep=True)
    assert mode.can_roll_back(folder)
    mode.train(3 + later)
    pretence.history.withdraw(folder, 3 + later)
    mode.undo(3, folder if later else None)
    load = pretence.asked("load")[-1]
    assert load["folder"].endswith("step-000003")
    assert load["moments"] == (str(folder / "moments.safetensors") if later else None)
    assert (load["shifts"], load["adapters"]) == ([], [])
    mode.train(4 + later)
    torch.testing.assert_close(pretence.observe(mode, 4 + later)[B], before[B] + 0.01)


def test_restart_replaces_the_trainer_by_one_that_begins_at_the_jump(pretence: Pretence) -> None:
    setup = pretence.setup(backend={"jump": "restart"})
    setup.updates = 2  # optimizer steps in an RL step
    mode = pretence.drive(setup)
    mode.start()
    mode.train(3)
    before = pretence.observe(mode, 3)
    folder = pretence.jump(mode, 3)
    old, new = pretence.asked("start")
    assert not psutil.pid_exists(old["pid"])
    assert (new["control"]["start"], new["control"]["seed"], new["options"]["--train.seed"]) == (3, 3, "3")
    assert new["options"]["--ckpt.path"] == str(pretence.trainer / "ckpt-000003")
    assert "--ckpt.load_enable" not in new["options"]
    (load,) = pretence.asked("load")
    assert load["pid"] == new["pid"]
    assert (load["shifts"], load["schedule"]) == ([str(folder / "shift.safetensors")], 6)
    assert new["control"]["scheduler_steps"] == 12
    mode.train(4)
    torch.testing.assert_close(pretence.observe(mode, 4)[B], before[B] + LENGTH + 0.01)
    assert pretence.prompts()[0] == "6+1="  # three steps of two prompts came before


@pytest.mark.parametrize("jump", ["swap", "restart"])
def test_resume_uses_the_newest_state_and_forgets_what_came_after_it(pretence: Pretence, jump: str) -> None:
    mode = pretence.started(jump=jump)
    mode.train(5)
    weights = pretence.observe(mode, 5)
    pretence.kill_trainer()
    mode.close()
    mode = pretence.mode(jump=jump)
    assert mode.resume({3, 4, 5}) == 4
    mode.start()
    assert not (pretence.out / "checkpoints" / "step-000005").exists()
    mode.train(5)
    start = pretence.asked("start")[-1]
    assert "--ckpt.load_enable" in start["options"]
    assert start["control"]["start"] == 0  # it counts on from its own state
    (load,) = pretence.asked("load")
    assert (load["folder"], load["shifts"], load["adapters"]) == (None, [], [])
    torch.testing.assert_close(pretence.observe(mode, 5)[B], weights[B])
    mode.train(6)
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3, 4, 5, 5, 6]


@pytest.mark.parametrize("step", [4, 5])
def test_a_resumed_run_keeps_a_jump_that_the_state_contains_and_forgets_a_later_one(
    pretence: Pretence, step: int
) -> None:
    mode = pretence.started()
    mode.train(step)
    pretence.observe(mode, step)
    folder = pretence.jump(mode, step, adapter=True)
    mode.train(5)
    weights = pretence.observe(mode, 5) if step == 4 else {}
    pretence.kill_trainer()
    mode.close()
    mode = pretence.mode()
    assert mode.resume({3, 4, 5}) == 4
    mode.start()
    assert folder.exists() is (step == 4)
    load = pretence.asked("load")[-1]
    assert (load["folder"], load["adapters"]) == (None, [str(folder / "adapter")] if step == 4 else [])
    mode.train(5)
    if step == 4:
        torch.testing.assert_close(pretence.observe(mode, 5)[B], weights[B])


@pytest.mark.parametrize("known", [True, False])
def test_restart_resumes_at_its_newest_jump_unless_the_run_does_not_know_it(pretence: Pretence, known: bool) -> None:
    mode = pretence.started(jump="restart")
    mode.train(3)
    before = pretence.observe(mode, 3)
    folder = pretence.jump(mode, 3)
    mode.abandon()
    mode = pretence.mode(jump="restart")
    assert mode.resume({3} if known else set()) == (3 if known else 2)
    assert folder.exists() is known
    if known:
        mode.start()
        start, load = pretence.asked("start")[-1], pretence.asked("load")[-1]
        assert "--ckpt.load_enable" not in start["options"]
        assert start["control"]["start"] == 3
        assert (load["shifts"], load["schedule"]) == ([str(folder / "shift.safetensors")], 3)
        mode.train(4)
        torch.testing.assert_close(pretence.observe(mode, 4)[B], before[B] + LENGTH + 0.01)


def test_a_trainer_that_resumes_from_another_step_is_refused(pretence: Pretence) -> None:
    mode = pretence.started()
    mode.train(3)
    mode.close()
    mode = pretence.mode({"takes_up": 1})
    assert mode.resume({3, 4, 5}) == 2
    with raises_kind("backend-failed", "step 1, not 2"):
        mode.start()


@pytest.mark.parametrize(
    ("plan", "last_words"),
    [
        ({"dies_in": "save"}, "as it were"),
        ({"dies_in": "load"}, "as it were"),
        ({"dies_in": "train"}, "as it were"),
        ({"dies_in_step": 1}, "out of luck"),
    ],
)
def test_a_trainer_that_dies_is_reported_with_its_last_lines(
    pretence: Pretence, plan: dict[str, Any], last_words: str
) -> None:
    mode = pretence.started(plan)
    with raises_kind("backend-process-lost", "status 1", "trainer.log", last_words):
        pretence.observe(mode, 0)
        pretence.jump(mode, 0)
        mode.train(1)
    assert pretence.metrics() == []


def test_a_trainer_that_died_while_it_paused_is_reported(pretence: Pretence) -> None:
    mode = pretence.started()
    mode.train(1)
    pretence.kill_trainer()
    with raises_kind("backend-process-lost", "SIGKILL", "trainer.log"):
        mode.train(2)


def test_a_trainer_that_does_not_start_is_reported_and_none_runs(pretence: Pretence) -> None:
    mode = pretence.mode({"does_not_start_at": 0})
    with raises_kind("backend-process-lost", "no such device"):
        mode.start()
    with raises_kind("backend-process-lost"):
        mode.train(1)


def test_after_a_failed_restart_no_trainer_runs_and_none_is_started(pretence: Pretence) -> None:
    mode = pretence.started({"does_not_start_at": 3}, jump="restart")
    mode.train(3)
    pretence.observe(mode, 3)
    with raises_kind("backend-process-lost", "no such device"):
        pretence.jump(mode, 3)
    with raises_kind("backend-process-lost"):
        mode.undo(3)
    assert [start["control"]["start"] for start in pretence.asked("start")] == [0, 3]


def test_a_request_that_fails_is_an_error_and_the_trainer_runs_on(pretence: Pretence) -> None:
    mode = pretence.started({"cannot": ["save_moments"]})
    mode.train(3)
    pretence.observe(mode, 3)
    with raises_kind("backend-failed", "save_moments", "ValueError: no such thing"):
        pretence.jump(mode, 3, keep=True)
    assert list(pretence.out.glob("jumps/*")) == []
    mode.train(4)


def test_a_trainer_that_pauses_elsewhere_is_an_error(pretence: Pretence) -> None:
    with raises_kind("backend-failed", "step 3, not 2"):
        pretence.started({"miscounts": 1}).train(2)


@pytest.mark.parametrize("step", [1, 4])
def test_engines_that_sample_from_other_weights_right_after_a_load_end_the_run(pretence: Pretence, step: int) -> None:
    mode = pretence.started({"kl": {str(step): -0.4}})
    with raises_kind("backend-failed", f"step {step}", "vllm_kl is -0.4", "0.03", "backend.max_vllm_kl"):
        mode.train(3)
        pretence.observe(mode, 3)
        pretence.jump(mode, 3)
        mode.train(5)
    assert [record["step"] for record in pretence.metrics()] == list(range(1, step + 1))


@pytest.mark.parametrize(("step", "bound"), [("3", 0.03), ("1", 0.5), ("1", None)])
def test_engines_may_drift_later_or_within_the_bound(pretence: Pretence, step: str, bound: float | None) -> None:
    pretence.started({"kl": {step: 0.4}}, backend={"max_vllm_kl": bound}, training={"lora": None}).train(4)
    assert pretence.asked("start")[0]["hooks"] == ["control"]  # full parameters need no other


def test_at_the_end_of_the_run_the_trainer_saves_its_model(pretence: Pretence) -> None:
    mode = pretence.started()
    mode.train(6)
    mode.close()
    assert pretence.asked()[-1]["do"] == "stop"
    assert (pretence.trainer / "final" / "tokenizer_config.json").exists()
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3, 4, 5, 6]
    mode.close()


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_before_the_end_the_trainer_is_killed(pretence: Pretence, end: str) -> None:
    mode = pretence.started()
    mode.train(5)
    getattr(mode, end)()
    assert pretence.asked()[-1]["do"] == "train"
    assert not (pretence.trainer / "final").exists()
    assert not psutil.pid_exists(pretence.asked()[-1]["pid"])
    with raises_kind("backend-process-lost"):
        mode.train(6)


def test_old_models_are_removed_while_training(pretence: Pretence) -> None:
    mode = pretence.started(backend={"save_hf": True, "keep_hf": 1}, save_every=1)
    for step in range(1, 6):
        mode.train(step)
    assert [path.name for path in (pretence.trainer / "ckpt-000000").glob("*_hf")] == ["global_step4_hf"]


def test_accuracy_is_measured_if_there_are_prompts(pretence: Pretence) -> None:
    mode = pretence.started()
    assert mode.evaluate("validation") == mode.evaluate("test") == 0.25
    assert pretence.asked("likelihood")[0]["pairs"][0] == ["0+1=", "1"]
    bare = {"data": {"train": pretence.setup().run.training.data.train}}
    assert pretence.mode(training=bare).evaluate("validation") is None


@pytest.mark.parametrize(("evaluation", "kind"), [("likelihood", "sampled"), ("generate", "greedy")])
def test_accuracies_are_named_by_the_way_of_answering(evaluation: str, kind: str, pretence: Pretence) -> None:
    setup = pretence.setup(training={"evaluation": evaluation})
    backend = OpenRlhfBackend(setup.config)
    backend._setup, found = setup, iter([0.5, None])
    backend._mode = SimpleNamespace(evaluate=lambda split: next(found))  # type: ignore[assignment]
    assert backend.accuracies("test") == {kind: 0.5}
    assert backend.accuracies("test") == {}


def no_reward(**_: Any) -> list[float]:
    raise LookupError("no reward for that")


def test_generated_answers_are_rewarded_while_the_trainer_waits(pretence: Pretence, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"prompt": "6+1=", "answer": "7"}\n{"prompt": "1+1=", "answer": "2"}\n')
    setup = pretence.setup(training={"evaluation": "generate"})
    setup.serve_rewards()
    mode = pretence.drive(setup)
    mode.start()
    assert mode.evaluate("validation") == 0.5  # it always says 7


def test_an_evaluation_that_failed_on_our_side_does_not_mix_up_the_answers(pretence: Pretence) -> None:
    """The cycle takes any error of a probe for an accuracy that cannot be measured, and trains on."""
    setup = pretence.setup(training={"evaluation": "generate", "reward": f"{__name__}:no_reward"})
    setup.serve_rewards()
    mode = pretence.drive(setup)
    mode.start()
    with raises_kind("backend-failed", "LookupError: no reward for that"):
        mode.evaluate("validation")
    mode.train(1)
    pretence.observe(mode, 1)

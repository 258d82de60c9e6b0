"""The backend with a simulated trainer: the contract of backends, and what trainers are asked, and when."""

import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from next_backends.external import trainer
from next_backends.openrlhf.openrlhf_backend import OpenRlhfBackend
from next_core.cycle.run import run
from next_core.testing import BackendCase, Check, checks_of
from tests.backends.external.pretence import Pretence, motion
from tests.errors import raises_kind

B = "base_model.model.first.lora_B.weight"
RESTART = {"jump": "restart"}
SERVED = {"reward_file": None}
FULL = {"training": {"lora": None}}


@pytest.mark.parametrize(("jump", "changes"), [("swap", {}), ("restart", {}), ("swap", FULL)])
@pytest.mark.parametrize("check", checks_of("backend").values(), ids=checks_of("backend"))
def test_it_keeps_the_contract(check: Check, jump: str, changes: dict[str, Any], pretence: Pretence) -> None:
    backend = OpenRlhfBackend(pretence.config(jump=jump))
    check(BackendCase(backend, pretence.run(**changes), pretence.folder / "checked"))


def test_it_prepares_without_a_trainer(pretence: Pretence) -> None:
    pretence.prepared()
    assert pretence.asked() == []


def test_a_trainer_pauses_after_the_steps_it_is_given_and_reports_all(pretence: Pretence) -> None:
    backend = pretence.started(seed=7)
    ended: list[int] = []
    backend.train(1, ended.append)
    backend.train(3, ended.append)
    assert [request["until"] for request in pretence.asked("train")] == [1, 3]
    assert ended == pretence.steps_logged() == [1, 2, 3]
    control = pretence.asked("start")[0]["control"]
    assert (control["start"], control["seed"], control["scheduler_steps"]) == (0, 7, 6)


def test_frozen_adapters_of_all_active_jumps_are_loaded(pretence: Pretence) -> None:
    backend = pretence.started()
    for step in (3, 4):
        pretence.observe(backend, step)
        pretence.jump(backend, step, space="merged")
    jumps = [str(pretence.out / "jumps" / name / "adapter") for name in ("0001", "0002")]
    assert [load["adapters"] for load in pretence.asked("load")] == [jumps[:1], jumps]
    assert [load["shifts"] for load in pretence.asked("load")] == [[], []]
    assert len(pretence.asked("start")) == 1


@pytest.mark.parametrize("later", [0, 2])
def test_a_rollback_restores_the_checkpoint_and_later_the_moments_too(pretence: Pretence, later: int) -> None:
    backend = pretence.started()
    before = pretence.observe(backend, 3)
    jump = pretence.jump(backend, 3, keep=True)
    backend.train(3 + later, lambda _: None)
    jump.rollback()
    asked = pretence.asked("load", "restore")[-1]
    expected = pretence.out / ("jumps/0001" if later else "checkpoints/step-000003")
    assert (asked["do"], asked["folder"]) == ("restore" if later else "load", str(expected))
    assert asked["adapters"] == []
    torch.testing.assert_close(pretence.observe(backend, 4 + later)[B], before[B] + motion(3 + later, 4 + later))


def test_restart_replaces_the_trainer_by_one_that_begins_at_the_jump(pretence: Pretence) -> None:
    backend = pretence.started({"epochs": 2}, backend=RESTART)  # two optimizer steps in an RL step
    before = pretence.observe(backend, 3)
    pretence.jump(backend, 3)
    old, new = pretence.asked("start")
    assert not psutil.pid_exists(old["pid"])
    assert (new["control"]["start"], new["control"]["seed"], new["options"]["--train.seed"]) == (3, 3, "3")
    assert new["options"]["--ckpt.path"] == str(pretence.trainer / "ckpt-000003")
    assert "--ckpt.load_enable" not in new["options"]
    (load,) = pretence.asked("load")
    assert (load["pid"], load["schedule"], len(load["shifts"])) == (new["pid"], 6, 1)
    assert new["control"]["scheduler_steps"] == 12
    torch.testing.assert_close(pretence.observe(backend, 4)[B], before[B] + motion(0, 3) + motion(3, 4))
    assert pretence.prompts()[0] == "6+1="  # three steps of two prompts came before


@pytest.mark.parametrize("jump", ["swap", "restart"])
def test_resume_uses_the_newest_state_and_forgets_what_came_after_it(pretence: Pretence, jump: str) -> None:
    backend = pretence.started(backend={"jump": jump})
    weights = pretence.observe(backend, 5)
    backend = pretence.resumed(backend, 4, backend={"jump": jump})
    assert not (pretence.out / "checkpoints" / "step-000005").exists()
    start = pretence.asked("start")[-1]
    assert "--ckpt.load_enable" in start["options"]
    assert start["control"]["start"] == 0  # it counts on from its own state
    (load,) = pretence.asked("load")
    assert (load["folder"], load["shifts"], load["adapters"]) == (None, [], [])
    torch.testing.assert_close(pretence.observe(backend, 5)[B], weights[B])
    assert pretence.steps_logged() == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("step", [4, 5])
def test_a_resumed_run_keeps_the_jump_in_its_state_and_forgets_a_later_one(pretence: Pretence, step: int) -> None:
    backend = pretence.started()
    pretence.observe(backend, step)
    pretence.jump(backend, step, space="merged")
    pretence.observe(backend, 5)
    pretence.resumed(backend, 4)
    folder = pretence.out / "jumps" / "0001"
    assert folder.exists() is (step == 4)
    load = pretence.asked("load")[-1]
    assert (load["folder"], load["adapters"]) == (None, [str(folder / "adapter")] if step == 4 else [])


@pytest.mark.parametrize("damage", ["jump.json", "adapter/adapter_model.safetensors"])
def test_a_run_is_not_resumed_without_a_damaged_jump_in_its_state(pretence: Pretence, damage: str) -> None:
    backend = pretence.started()
    pretence.observe(backend, 3)
    pretence.jump(backend, 3, space="merged")
    backend.train(5, lambda _: None)
    backend.close()
    file = pretence.out / "jumps" / "0001" / damage
    file.write_text("{" * file.stat().st_size)
    with raises_kind("checkpoint-damaged", file):
        pretence.prepared(step=4)
    assert file.exists()


@pytest.mark.parametrize("known", [True, False])
def test_restart_resumes_at_its_newest_jump_unless_the_journal_lacks_it(pretence: Pretence, known: bool) -> None:
    backend = pretence.started(backend=RESTART)
    before = pretence.observe(backend, 3)
    pretence.jump(backend, 3)
    if not known:
        (pretence.out / "journal.jsonl").unlink()
    pretence.kill_trainer()
    backend.close()
    backend = pretence.prepared(backend=RESTART, step=3 if known else 2)
    assert (pretence.out / "jumps" / "0001").exists() is known
    if known:
        backend.start()
        start, load = pretence.asked("start")[-1], pretence.asked("load")[-1]
        assert "--ckpt.load_enable" not in start["options"]
        assert (start["control"]["start"], load["schedule"], len(load["shifts"])) == (3, 3, 1)
        torch.testing.assert_close(pretence.observe(backend, 4)[B], before[B] + motion(0, 3) + motion(3, 4))


@pytest.mark.parametrize(
    "damaged", ["checkpoints/step-000003/adapter_model.safetensors", "jumps/0001/shift.safetensors"]
)
def test_restart_does_not_resume_from_damaged_weights(pretence: Pretence, damaged: str) -> None:
    backend = pretence.started(backend=RESTART)
    pretence.observe(backend, 3)
    pretence.jump(backend, 3)
    pretence.kill_trainer()
    backend.close()
    file = pretence.out / damaged
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with raises_kind("checkpoint-damaged", file):
        pretence.started(backend=RESTART, step=3)


def test_a_trainer_that_resumes_from_another_step_is_refused(pretence: Pretence) -> None:
    backend = pretence.started()
    pretence.observe(backend, 3)
    backend.close()
    with raises_kind("backend-failed", "step 1, not 2"):
        pretence.started({"takes_up": 1}, step=2)


@pytest.mark.parametrize(
    ("plan", "last_words"),
    [
        ({"dies_in": "save"}, "as it were"),
        ({"dies_in": "load"}, "as it were"),
        ({"dies_in": "train"}, "as it were"),
        ({"dies_in_step": 1}, "out of luck"),
        ({"does_not_start_at": 0}, "no such device"),
    ],
)
def test_a_dead_trainer_is_reported_with_last_lines(pretence: Pretence, plan: dict[str, Any], last_words: str) -> None:
    backend = pretence.prepared(plan)
    with raises_kind("backend-process-lost", "status 1", "trainer.log", last_words):
        backend.start()
        pretence.observe(backend, 1)
        pretence.jump(backend, 1)
    with raises_kind("backend-process-lost"):
        backend.train(2, lambda _: None)


def test_a_trainer_that_sends_too_much_is_not_read(pretence: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pretence.started()
    monkeypatch.setattr(trainer, "LONGEST", 10)
    monkeypatch.setattr(trainer, "LAST_WORDS", 0.1)
    with raises_kind("backend-process-lost", "bad message length"):
        pretence.observe(backend, 1)


def test_a_trainer_that_died_while_it_paused_is_reported(pretence: Pretence) -> None:
    backend = pretence.started()
    pretence.kill_trainer()
    with raises_kind("backend-process-lost", "SIGKILL", "trainer.log"):
        pretence.observe(backend, 1)


def test_after_a_failed_restart_no_trainer_runs_and_the_jump_is_gone(pretence: Pretence) -> None:
    backend = pretence.started({"does_not_start_at": 3}, backend=RESTART)
    pretence.observe(backend, 3)
    with raises_kind("backend-process-lost", "no such device") as caught:
        pretence.jump(backend, 3)
    assert "could not be restored" in caught.value.__notes__[0]
    assert list(pretence.out.glob("jumps/*")) == []
    with raises_kind("backend-process-lost"):
        pretence.observe(backend, 4)
    assert [start["control"]["start"] for start in pretence.asked("start")] == [0, 3]


def test_a_request_that_fails_is_an_error_and_the_trainer_runs_on(pretence: Pretence) -> None:
    backend = pretence.started({"cannot": ["keep"]})
    pretence.observe(backend, 3)
    with raises_kind("backend-failed", "'keep'", "ValueError: no such thing"):
        pretence.jump(backend, 3, keep=True)
    assert list(pretence.out.glob("jumps/*")) == []
    pretence.observe(backend, 4)


def test_a_trainer_that_pauses_elsewhere_is_an_error(pretence: Pretence) -> None:
    with raises_kind("backend-failed", "step 3, not 2"):
        pretence.observe(pretence.started({"miscounts": 1}), 2)


@pytest.mark.parametrize(("step", "kl"), [(1, -0.4), (4, -0.4), (4, float("nan"))])
def test_engines_with_other_weights_right_after_a_load_end_the_run(pretence: Pretence, step: int, kl: float) -> None:
    backend = pretence.started({"kl": {str(step): kl}})
    with raises_kind("backend-failed", f"step {step}", f"vllm_kl is {kl:g}", "0.03", "backend.max_vllm_kl"):
        pretence.observe(backend, 3)
        pretence.jump(backend, 3)
        pretence.observe(backend, 5)
    assert pretence.steps_logged() == list(range(1, step + 1))


@pytest.mark.parametrize(("step", "bound"), [("3", 0.03), ("1", 0.5), ("1", None)])
def test_engines_may_drift_later_or_within_the_bound(pretence: Pretence, step: str, bound: float | None) -> None:
    pretence.observe(pretence.started({"kl": {step: 0.4}}, backend={"max_vllm_kl": bound}), 4)


def test_at_the_end_of_the_run_the_trainer_saves_its_model_and_states_to_return_to_go(pretence: Pretence) -> None:
    backend = pretence.started()
    (pretence.out / "kept").mkdir()
    pretence.observe(backend, 6)
    backend.close()
    assert not (pretence.out / "kept").exists()
    assert pretence.asked()[-1]["do"] == "stop"
    assert (pretence.trainer / "final" / "tokenizer_config.json").exists()


def test_before_the_end_the_trainer_is_killed(pretence: Pretence) -> None:
    backend = pretence.started()
    (pretence.out / "kept").mkdir()
    pretence.observe(backend, 5)
    backend.close()
    assert (pretence.out / "kept").exists()
    assert pretence.asked()[-1]["do"] == "save"
    assert not (pretence.trainer / "final").exists()
    assert not psutil.pid_exists(pretence.asked()[-1]["pid"])
    with raises_kind("backend-process-lost"):
        backend.train(6, lambda _: None)


def test_old_models_are_removed_while_training(pretence: Pretence) -> None:
    backend = pretence.started(backend={"save_hf": True, "keep_hf": 1}, save_every=1)
    for step in range(1, 6):
        backend.train(step, lambda _: None)
    assert [path.name for path in (pretence.trainer / "ckpt-000000").glob("*_hf")] == ["global_step4_hf"]


def test_likelihood_is_of_the_held_out_answers(pretence: Pretence) -> None:
    backend = pretence.started()
    assert backend.accuracies("validation") == backend.accuracies("test") == {"sampled": 0.25}
    assert pretence.asked("likelihood")[0]["pairs"][0] == ["0+1=", "1"]


def test_without_held_out_prompts_there_is_no_accuracy(pretence: Pretence, tmp_path: Path) -> None:
    backend = pretence.prepared(training={"data": {"train": tmp_path / "train.jsonl"}})
    assert backend.evaluate() is None
    assert backend.accuracies("test") == {}


def test_generated_answers_are_rewarded_while_the_trainer_waits(pretence: Pretence, tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"prompt": "6+1=", "answer": "7"}\n{"prompt": "1+1=", "answer": "2"}\n')
    backend = pretence.started(training={"evaluation": "generate"}, backend=SERVED)
    assert backend.accuracies("validation") == {"greedy": 0.5}  # it always says 7


def no_reward(**_: Any) -> list[float]:
    raise LookupError("no reward for that")


def test_an_evaluation_that_failed_on_our_side_does_not_mix_up_the_answers(pretence: Pretence) -> None:
    """The cycle takes any error of a probe for an accuracy that cannot be measured, and trains on."""
    training = {"evaluation": "generate", "reward": f"{__name__}:no_reward"}
    backend = pretence.started(training=training, backend=SERVED)
    with raises_kind("backend-failed", "LookupError: no reward for that"):
        backend.evaluate("validation")
    pretence.observe(backend, 1)


SCALING = {"predictor": "step-scale", "schedule": {"observe": 5, "every": 5}}


def test_a_resumed_run_of_scaled_steps_continues_with_its_multiple_and_its_rewards(pretence: Pretence) -> None:
    backend = pretence.started(**SCALING)
    backend.follow_steps([4])
    for step in range(1, 6):
        backend.train(step, lambda _: None)
        backend.steps.after_step()
        backend.steps.multiple = 1.0 + step
    backend = pretence.resumed(backend, 4, plan={"lost": "they are gone"}, **SCALING)
    backend.follow_steps([4])
    asked = pretence.asked("follow_steps")[-1]
    assert (asked["windows"], asked["folder"]) == ([4], str(pretence.trainer / "ckpt-000000/_actor/global_step4"))
    assert (asked["kept"], asked["at"]) == (str(pretence.out / "kept"), 4)
    assert "they are gone" in backend.notes
    assert backend.steps.multiple == 5.0
    assert [(reward.step, reward.steps) for reward in backend.rewards()] == [(step, 1) for step in range(1, 5)]
    first = backend.rewards()[0]
    assert (first.mean, first.error) == (0.01, 0.25)
    assert pretence.asked("save") == []  # no checkpoints of ours


def test_the_cycle_scales_steps_and_pauses_after_each(pretence: Pretence) -> None:
    block = {"name": "openrlhf", **pretence.config().model_dump(mode="json")}
    result = run(pretence.run(backend=block, **SCALING), pretence.out)
    assert [request["until"] for request in pretence.asked("train")] == [1, 2, 3, 4, 5, 6]
    methods = [request["method"] for request in pretence.asked("on_steps")]
    assert methods.count("after_step") == 6
    (scaled,) = result.scaling
    assert (scaled["step"], scaled["multiple"]) == (5, pytest.approx(math.exp(0.8 * 0.5)))


def test_several_optimizer_steps_in_one_rl_step_cannot_be_scaled(pretence: Pretence) -> None:
    backend = pretence.started({"epochs": 2}, **SCALING)
    with raises_kind("backend-unsupported", "2 optimizer steps", "--train.max_epochs"):
        backend.follow_steps([4])


def test_restart_cannot_scale_steps(pretence: Pretence) -> None:
    with raises_kind("backend-unsupported", "backend.jump: restart", "step-scale", "swap"):
        pretence.prepared(backend=RESTART, **SCALING)

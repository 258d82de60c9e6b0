"""What every trainer of a run is given: options, prompts, environment, settings."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from next_backends.openrlhf.trainer_setup import TrainerSetup
from next_core.errors import BackendError, ConfigError
from tests.backends.openrlhf.pretending import Pretence

MERGE: dict[str, Any] = {"backend": {"jump": "merge"}, "training": {"lora": None}, "save_every": None}


@pytest.fixture
def pretence(tmp_path: Path) -> Iterator[Pretence]:
    with Pretence(tmp_path) as made:
        yield made


def option(words: list[str], name: str) -> str | None:
    if name not in words:
        return None
    return words[words.index(name) + 1]


def numbers(words: list[str], *names: str) -> tuple[int, ...]:
    return tuple(int(option(words, name) or -1) for name in names)


def test_too_few_prompts_for_one_step_are_refused(pretence: Pretence) -> None:
    with pytest.raises(ConfigError, match=r"train\.jsonl has 8 prompts, fewer than the 9 of one step"):
        pretence.setting(training={"prompts_per_step": 9})
    pretence.setting(training={"prompts_per_step": 8})


def test_a_trainer_under_control_has_whole_steps_and_enough_of_them(pretence: Pretence) -> None:
    words = pretence.setting(training={"prompts_per_step": 3}).options(0)
    assert numbers(words, "--data.max_samples", "--rollout.batch_size", "--train.num_episodes") == (6, 3, 6)
    assert numbers(words, "--train.batch_size", "--rollout.n_samples_per_prompt") == (6, 2)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 50])
def test_a_segment_is_exactly_its_steps_and_goes_through_all_prompts(
    pretence: Pretence, batch: int, steps: int
) -> None:
    setting = pretence.setting(**{**MERGE, "training": {"lora": None, "prompts_per_step": batch}})
    assert numbers(setting.options(2, steps=steps), "--data.max_samples", "--train.num_episodes") == (steps * batch, 1)
    setting.write_prompts(2, steps)
    rows = [json.loads(line) for line in (pretence.out / "trainer" / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"{(2 * batch + n) % 8}+1=" for n in range(steps * batch)]


def test_each_trainer_has_its_own_seed_and_folder(pretence: Pretence) -> None:
    setting = pretence.setting(seed=7)
    first, second = setting.options(0), setting.options(3)
    assert [option(words, "--train.seed") for words in (first, second)] == ["7", "10"]
    folders = [option(words, "--ckpt.path") for words in (first, second)]
    assert folders == [str(pretence.out / "trainer" / f"ckpt-{start:06d}") for start in (0, 3)]


def test_states_are_saved_for_resuming_and_models_for_merging(pretence: Pretence) -> None:
    words = pretence.setting().options(0)
    assert option(words, "--ckpt.save_steps") == "2"
    assert not {"--ckpt.save_hf", "--ckpt.disable_ds", "--ckpt.load_enable"} & set(words)
    assert option(words, "--ckpt.max_num") == "3"
    assert "--ckpt.save_hf" in pretence.setting(backend={"save_hf": True}).options(0)
    assert "--ckpt.load_enable" in pretence.setting().options(0, load=True)
    words = pretence.setting(**MERGE).options(0)
    assert option(words, "--ckpt.save_steps") == "1"  # schedule.every
    assert "--ckpt.save_hf" in words
    assert "--ckpt.disable_ds" not in words
    assert int(option(words, "--ckpt.max_num") or 0) > 1000
    without = {**MERGE, "backend": {"jump": "merge", "masters": False}}
    assert "--ckpt.disable_ds" in pretence.setting(**without).options(0)


def test_a_trainer_may_begin_with_another_model(pretence: Pretence, tmp_path: Path) -> None:
    setting = pretence.setting(**MERGE)
    assert option(setting.options(0), "--actor.model_name_or_path") == str(tmp_path / "base")
    model = tmp_path / "model-000003"
    assert option(setting.options(3, model=model, steps=2), "--actor.model_name_or_path") == str(model)


def test_conversations_get_the_chat_template(pretence: Pretence, tmp_path: Path) -> None:
    assert "--data.apply_chat_template" not in pretence.setting().options(0)
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": str(n + 1)} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = pretence.setting()
    assert "--data.apply_chat_template" in setting.options(0)
    setting.write_prompts(0)
    line = (pretence.out / "trainer" / "prompts.jsonl").read_text().splitlines()[0]
    assert json.loads(line) == rows[0]


@pytest.mark.parametrize(("start", "first"), [(0, 0), (3, 6), (4, 0), (5, 2)])
def test_prompts_go_on_where_the_run_is(pretence: Pretence, start: int, first: int) -> None:
    pretence.setting().write_prompts(start)
    rows = [json.loads(line) for line in (pretence.out / "trainer" / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"{(first + n) % 8}+1=" for n in range(8)]
    assert set(rows[0]) == {"prompt", "answer"}


def test_a_served_reward_is_where_the_options_say(pretence: Pretence) -> None:
    setting = pretence.setting()
    setting.serve_rewards()
    assert setting.rewards is not None
    assert option(setting.options(0), "--reward.remote_url") == setting.rewards.url
    setting.close()
    assert setting.rewards is None
    setting.close()


def test_a_reward_file_is_not_served(pretence: Pretence, tmp_path: Path) -> None:
    setting = pretence.setting(backend={"reward_file": tmp_path / "reward.py", "ray": {"address": "10.0.0.1:6379"}})
    setting.serve_rewards()
    assert setting.rewards is None
    assert option(setting.options(0), "--reward.remote_url") == str(tmp_path / "reward.py")


def test_a_cluster_cannot_ask_for_rewards_here(pretence: Pretence) -> None:
    setting = pretence.setting(backend={"ray": {"address": "10.0.0.1:6379"}})
    with pytest.raises(ConfigError, match=r"backend\.ray\.address: .*backend\.reward_file"):
        setting.serve_rewards()


def test_a_reward_that_is_not_there_is_named(pretence: Pretence) -> None:
    with pytest.raises(ConfigError, match="no_such_module:reward"):
        pretence.setting(training={"reward": "no_such_module:reward"}).serve_rewards()


def begun(pretence: Pretence, setting: TrainerSetup) -> dict[str, Any]:
    """What a trainer with all that is told and sees."""
    setting.write_prompts(0, 1)
    watch = setting.start(setting.options(0, steps=1), ["lora"], None)
    try:
        watch.end()
    finally:
        watch.process.stop()
    found: dict[str, Any] = pretence.asked("start")[-1]
    return found


def test_the_settings_file_is_for_the_owner_alone(pretence: Pretence) -> None:
    setting = pretence.setting()
    mask = os.umask(0)
    try:
        begun(pretence, setting)
        (pretence.out / "trainer" / "launch.json").chmod(0o644)
        begun(pretence, setting)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((pretence.out / "trainer" / "launch.json").stat().st_mode) == 0o600


def test_our_own_python_is_not_the_trainers(pretence: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIRTUAL_ENV", "PYTHONPATH"):
        monkeypatch.setenv(name, "/ours")
    monkeypatch.setenv("PATH", f"/ours/bin{os.pathsep}{os.environ['PATH']}")
    seen = begun(pretence, pretence.setting())["seen"]
    assert (seen["VIRTUAL_ENV"], seen["PYTHONPATH"], seen["PYTHONHOME"]) == (None, None, None)
    assert seen["PATH"].startswith(f"{pretence.python.parent}{os.pathsep}/ours/bin{os.pathsep}")


def test_a_trainer_is_told_its_ray_its_hooks_and_its_environment(pretence: Pretence) -> None:
    ray = {"num_gpus": 4, "num_cpus": 8, "object_store_mib": 100}
    found = begun(pretence, pretence.setting(backend={"ray": ray}))
    local = found["ray"]
    assert not Path(local.pop("_temp_dir")).exists()  # of the trainer's own, and gone with it
    assert local == {
        "address": "local",
        "include_dashboard": False,
        "num_gpus": 4,
        "num_cpus": 8,
        "object_store_memory": 100 * 2**20,
    }
    assert found["hooks"] == ["lora"]
    assert found["control"] is None
    assert "PRETEND_RECORD" in found["env"]
    cluster = {"ray": {"address": "10.0.0.1:6379"}, "reward_file": "reward.py"}
    assert begun(pretence, pretence.setting(backend=cluster))["ray"] == {"address": "10.0.0.1:6379"}


def test_steps_are_kept_as_metrics_and_passed_on(pretence: Pretence) -> None:
    setting = pretence.setting()
    told: list[int] = []
    setting.step_ended = told.append
    pretence.out.mkdir()
    setting.logged(3, {"reward": 0.5, "vllm_kl": -0.01, "kl": float("nan")}, check=True)
    assert pretence.metrics() == [{"step": 3, "reward": 0.5, "vllm_kl": -0.01}]
    assert told == [3]
    with pytest.raises(BackendError, match="step 4: .*vllm_kl nan"):
        setting.logged(4, {"vllm_kl": float("nan")}, check=True)
    setting.logged(5, {"vllm_kl": 0.9})
    assert told == [3, 4, 5]

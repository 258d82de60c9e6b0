"""What every trainer of a run is given: options, prompts, environment, settings."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from next_backends.openrlhf.trainer import Trainer
from next_backends.openrlhf.trainer_setup import TrainerSetup
from tests.backends.openrlhf.cpu import recorded_options
from tests.backends.openrlhf.pretence import Pretence
from tests.errors import raises_kind

MERGE: dict[str, Any] = {"backend": {"jump": "merge"}, "training": {"lora": None}, "save_every": None}
SAVING = ("--ckpt.save_steps", "--ckpt.save_hf", "--ckpt.disable_ds", "--ckpt.load_enable", "--ckpt.max_num")


def options(setup: TrainerSetup, *names: str, start: int = 0, **asked: Any) -> tuple[Any, ...]:
    """The values of these options; None where one is left out."""
    found = recorded_options.parse(setup.options(start, **asked))
    return tuple(found.get(name) for name in names)


def test_too_few_prompts_for_one_step_are_refused(pretence: Pretence) -> None:
    with raises_kind("config-invalid-value", "train.jsonl", "8 prompts", "9"):
        pretence.setup(training={"prompts_per_step": 9})
    pretence.setup(training={"prompts_per_step": 8})


def test_a_trainer_under_control_has_whole_steps_and_enough_of_them(pretence: Pretence) -> None:
    setup = pretence.setup(training={"prompts_per_step": 3})
    names = ("--data.max_samples", "--rollout.batch_size", "--train.num_episodes", "--train.batch_size")
    assert options(setup, *names) == (6, 3, 6, 6)


@pytest.mark.parametrize(("batch", "steps"), [(1, 3), (2, 1), (3, 7), (8, 50)])
def test_a_segment_is_exactly_its_steps_and_goes_through_all_prompts(
    pretence: Pretence, batch: int, steps: int
) -> None:
    setup = pretence.setup(**{**MERGE, "training": {"lora": None, "prompts_per_step": batch}})
    found = options(setup, "--data.max_samples", "--train.num_episodes", start=2, steps=steps)
    assert found == (steps * batch, 1)
    setup.write_prompts(2, steps)
    assert pretence.prompts() == [f"{(2 * batch + n) % 8}+1=" for n in range(steps * batch)]


@pytest.mark.parametrize(("start", "first"), [(0, 0), (3, 6), (4, 0), (5, 2)])
def test_prompts_continue_where_the_run_is(pretence: Pretence, start: int, first: int) -> None:
    pretence.setup().write_prompts(start)
    assert pretence.prompts() == [f"{(first + n) % 8}+1=" for n in range(8)]


@pytest.mark.parametrize("start", [0, 3])
def test_each_trainer_has_its_own_seed_and_folder(pretence: Pretence, start: int) -> None:
    found = options(pretence.setup(seed=7), "--train.seed", "--ckpt.path", start=start)
    assert found == (7 + start, str(pretence.trainer / f"ckpt-{start:06d}"))


@pytest.mark.parametrize(
    ("run", "asked", "expected"),
    [
        ({}, {}, (2, None, None, None, 3)),
        ({"save_every": None}, {}, (-1, None, None, None, 3)),
        ({"backend": {"save_hf": True}}, {"load": True}, (2, True, None, True, 3)),
        (MERGE, {}, (1, True, None, None, 10**6)),  # schedule.every
        (MERGE, {"observed": False}, (-1, True, None, None, 10**6)),
        ({**MERGE, "backend": {"jump": "merge", "masters": False}}, {}, (1, True, True, None, 10**6)),
    ],
)
def test_states_are_saved_for_resuming_and_models_for_merging(
    pretence: Pretence, run: dict[str, Any], asked: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert options(pretence.setup(**run), *SAVING, **asked) == expected


def test_a_trainer_may_begin_with_another_model(pretence: Pretence) -> None:
    setup, name = pretence.setup(**MERGE), "--actor.model_name_or_path"
    assert options(setup, name) == (str(pretence.base),)
    assert options(setup, name, start=3, model=Path("/model-000003"), steps=2) == ("/model-000003",)


def test_conversations_get_the_chat_template(pretence: Pretence, tmp_path: Path) -> None:
    assert options(pretence.setup(), "--data.apply_chat_template") == (None,)
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": str(n + 1)} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup = pretence.setup()
    assert options(setup, "--data.apply_chat_template") == (True,)
    setup.write_prompts(0)
    assert (pretence.trainer / "prompts.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()


def test_rewards_are_served_or_come_from_a_file(pretence: Pretence) -> None:
    setup, cluster = pretence.setup(), {"address": "10.0.0.1:6379"}
    setup.serve_rewards()
    assert setup.rewards is not None
    assert options(setup, "--reward.remote_url") == (setup.rewards.url,)
    setup.close()
    assert setup.rewards is None
    setup.close()
    setup = pretence.setup(backend={"reward_file": "/reward.py", "ray": cluster})
    setup.serve_rewards()
    assert setup.rewards is None
    assert options(setup, "--reward.remote_url") == ("/reward.py",)
    with raises_kind("backend-unsupported", "backend.ray.address", "backend.reward_file"):
        pretence.setup(backend={"ray": cluster}).serve_rewards()


def trained(pretence: Pretence, setup: TrainerSetup) -> dict[str, Any]:
    """What a trainer of one step is given and sees."""
    setup.write_prompts(0, 1)
    trainer = Trainer(setup, setup.options(0, steps=1), ["lora"])
    try:
        trainer.wait_for_end()
    finally:
        trainer.kill()
    found: dict[str, Any] = pretence.asked("start")[-1]
    return found


def test_the_settings_file_is_for_the_owner_alone(pretence: Pretence) -> None:
    path = pretence.trainer / "launch.json"
    path.parent.mkdir(parents=True)
    path.write_text("of another trainer")
    path.chmod(0o644)
    mask = os.umask(0)
    try:
        trained(pretence, pretence.setup())
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_our_own_python_is_not_the_trainers(pretence: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIRTUAL_ENV", "PYTHONPATH"):
        monkeypatch.setenv(name, "/ours")
    monkeypatch.setenv("PATH", f"/ours/bin{os.pathsep}{os.environ['PATH']}")
    seen = trained(pretence, pretence.setup())["seen"]
    assert (seen["VIRTUAL_ENV"], seen["PYTHONPATH"], seen["PYTHONHOME"]) == (None, None, None)
    assert seen["PATH"].startswith(f"{pretence.python.parent}{os.pathsep}/ours/bin{os.pathsep}")


def test_a_trainer_gets_its_ray_its_hooks_and_its_environment(pretence: Pretence) -> None:
    ray = {"num_gpus": 4, "num_cpus": 8, "object_store_mib": 100}
    found = trained(pretence, pretence.setup(backend={"ray": ray}))
    local = found["ray"]
    assert not Path(local.pop("_temp_dir")).parent.exists()  # of the trainer's own, and gone with it
    assert local == {
        "address": "local",
        "include_dashboard": False,
        "num_gpus": 4,
        "num_cpus": 8,
        "object_store_memory": 100 * 2**20,
    }
    assert (found["hooks"], found["control"]) == (["lora"], None)
    assert "PRETEND_RECORD" in found["env"]
    cluster = {"ray": {"address": "10.0.0.1:6379"}, "reward_file": "reward.py"}
    assert trained(pretence, pretence.setup(backend=cluster))["ray"] == {"address": "10.0.0.1:6379"}


def test_steps_become_metrics_and_are_passed_on(pretence: Pretence) -> None:
    setup = pretence.setup()
    ended: list[int] = []
    setup.step_ended = ended.append
    pretence.out.mkdir()
    setup.step_logged(3, {"reward": 0.5, "vllm_kl": -0.01, "kl": float("nan")}, check=True)
    assert pretence.metrics() == [{"step": 3, "reward": 0.5, "vllm_kl": -0.01}]
    with raises_kind("backend-failed", "step 4", "vllm_kl is nan"):
        setup.step_logged(4, {"vllm_kl": float("nan")}, check=True)
    setup.step_logged(5, {"vllm_kl": 0.9})
    assert ended == [3, 4, 5]

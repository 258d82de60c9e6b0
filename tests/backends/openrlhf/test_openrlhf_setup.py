"""What every trainer of a run is given: options, prompts, environment, settings."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import next_backends
from next_backends.openrlhf.openrlhf_setup import OpenRlhfSetup
from tests.backends.external.pretence import Pretence
from tests.backends.openrlhf.cpu import recorded_options
from tests.errors import raises_kind

BACKENDS = Path(next_backends.__file__).parent


def setup(pretence: Pretence, backend: dict[str, Any] | None = None, **run: Any) -> OpenRlhfSetup:
    return OpenRlhfSetup(pretence.run(**run), pretence.config(**(backend or {})), pretence.out)


def options(setup: OpenRlhfSetup, *names: str, start: int = 0, load: bool = False) -> tuple[Any, ...]:
    """The values of these options; None where one is left out."""
    found = recorded_options.parse(setup.options(start, load))
    return tuple(found.get(name) for name in names)


def test_a_reward_that_is_no_number_is_none(pretence: Pretence) -> None:
    """In the sums of the collapse guard it would stay, and the guard would never act again."""
    pretence.out.mkdir()
    made = setup(pretence)
    for step, mean in ((1, 0.5), (2, math.nan)):
        made.step_logged(step, {"rollout/reward_mean": mean, "rollout/reward_std": 0.1, "rollout/num_samples": 4.0})
    assert [reward.step for reward in made.logged] == [1]


def test_too_few_prompts_for_one_step_are_refused(pretence: Pretence) -> None:
    with raises_kind("config-invalid-value", "train.jsonl", "8 prompts", "9"):
        setup(pretence, training={"prompts_per_step": 9})
    setup(pretence, training={"prompts_per_step": 8})


def test_a_trainer_has_whole_steps_and_enough_of_them(pretence: Pretence) -> None:
    names = ("--data.max_samples", "--rollout.batch_size", "--train.num_episodes", "--train.batch_size")
    assert options(setup(pretence, training={"prompts_per_step": 3}), *names) == (6, 3, 6, 6)


@pytest.mark.parametrize(("start", "first"), [(0, 0), (3, 6), (4, 0), (5, 2)])
def test_prompts_seed_and_folder_are_those_of_the_step(pretence: Pretence, start: int, first: int) -> None:
    made = setup(pretence, seed=7)
    made.write_prompts(start)
    assert pretence.prompts() == [f"{(first + n) % 8}+1=" for n in range(8)]
    folder = str(pretence.trainer / f"ckpt-{start:06d}")
    assert options(made, "--train.seed", "--ckpt.path", start=start) == (7 + start, folder)


@pytest.mark.parametrize(
    ("backend", "save_every", "load", "expected"),
    [
        ({}, 2, False, (2, None, None)),
        ({}, None, False, (-1, None, None)),
        ({"save_hf": True}, 5, True, (5, True, True)),
    ],
)
def test_states_are_saved_for_resuming(
    pretence: Pretence, backend: dict[str, Any], save_every: int | None, load: bool, expected: tuple[Any, ...]
) -> None:
    names = ("--ckpt.save_steps", "--ckpt.save_hf", "--ckpt.load_enable")
    assert options(setup(pretence, backend, save_every=save_every), *names, load=load) == expected


def test_conversations_get_the_chat_template(pretence: Pretence, tmp_path: Path) -> None:
    assert options(setup(pretence), "--data.apply_chat_template") == (None,)
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": str(n + 1)} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretence.out.mkdir()
    made = setup(pretence)
    assert options(made, "--data.apply_chat_template") == (True,)
    made.write_prompts(0)
    assert (pretence.trainer / "prompts.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()


def test_rewards_are_served_or_come_from_a_file(pretence: Pretence) -> None:
    made = setup(pretence, {"reward_file": None})
    made.serve_rewards()
    assert made.rewards is not None
    assert options(made, "--reward.remote_url") == (made.rewards.url,)
    made.close()
    assert made.rewards is None
    made = setup(pretence, {"reward_file": "/reward.py"})
    made.serve_rewards()
    assert made.rewards is None
    assert options(made, "--reward.remote_url") == ("/reward.py",)


def test_a_trainer_gets_its_own_environment_and_ray(pretence: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIRTUAL_ENV", "PYTHONPATH"):
        monkeypatch.setenv(name, "/ours")
    monkeypatch.setenv("PATH", f"/ours/bin{os.pathsep}{os.environ['PATH']}")
    backend = pretence.started(backend={"ray": {"num_gpus": 4, "num_cpus": 8, "object_store_mib": 100}})
    (start,) = pretence.asked("start")
    seen, ray = start["seen"], start["ray"]
    assert (seen["VIRTUAL_ENV"], seen["PYTHONHOME"]) == (None, None)
    modules, *scripts = map(Path, seen["PYTHONPATH"].split(os.pathsep))  # of ours, and nothing else of this environment
    assert sorted(path.name for path in modules.rglob("*")) == ["next_backends", "next_core", "sharding.py"]
    assert [path.relative_to(BACKENDS).parts for path in scripts] == [
        ("openrlhf", "trainer_side"),
        ("external", "trainer_side"),
    ]
    assert seen["PYTHONPATH"] == start["env"]["PYTHONPATH"]
    assert seen["PATH"].startswith(f"{pretence.python.parent}{os.pathsep}/ours/bin{os.pathsep}")
    assert "PRETEND_RECORD" in start["env"]
    assert (ray["num_gpus"], ray["num_cpus"], ray["object_store_memory"]) == (4, 8, 100 * 2**20)
    scratch = Path(ray["_temp_dir"]).parent
    assert scratch.stat().st_mode & 0o77 == 0  # other users reach neither the socket nor the settings
    backend.close()
    assert not scratch.exists()

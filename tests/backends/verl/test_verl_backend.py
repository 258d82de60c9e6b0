"""The backend for verl with a simulated trainer: the contract of backends, resuming, and what is refused."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import next_backends
from next_backends.verl.verl_backend import VerlBackend
from next_core.testing import BackendCase, Check, checks_of
from tests.backends.external.pretence import Pretence
from tests.errors import raises_kind

B = "base_model.model.first.lora_B.weight"
BACKENDS = Path(next_backends.__file__).parent


@pytest.fixture
def pretence(tmp_path: Path) -> Iterator[Pretence]:
    with Pretence(tmp_path, VerlBackend) as made:
        yield made


@pytest.mark.parametrize("changes", [{}, {"training": {"lora": None}}], ids=["lora", "full"])
@pytest.mark.parametrize("check", checks_of("backend").values(), ids=checks_of("backend"))
def test_it_keeps_the_contract(check: Check, changes: dict[str, Any], pretence: Pretence) -> None:
    check(BackendCase(VerlBackend(pretence.config()), pretence.run(**changes), pretence.folder / "checked"))


def test_it_is_said_to_be_experimental(pretence: Pretence) -> None:
    assert any("experimental" in note for note in VerlBackend(pretence.config()).notes)


def test_a_trainer_gets_its_reward_and_what_it_imports(pretence: Pretence) -> None:
    backend = pretence.started()
    (start,) = pretence.asked("start")
    _, *scripts = map(Path, start["seen"]["PYTHONPATH"].split(os.pathsep))
    parts = [path.relative_to(BACKENDS).parts for path in scripts]
    assert parts == [("verl", "trainer_side"), ("external", "trainer_side")]
    assert start["options"]["reward.custom_reward_function.path"] == str(scripts[0] / "reward.py")
    assert start["seen"]["NEXT_CORE_REWARD"] == backend._setup.rewards.url


def test_resume_uses_the_newest_complete_checkpoint_and_keeps_the_jump_in_it(pretence: Pretence) -> None:
    backend = pretence.started({"dies_in_save": 6}, steps=8)
    pretence.observe(backend, 3)
    pretence.jump(backend, 3)
    four = pretence.observe(backend, 4)
    pretence.observe(backend, 5)
    backend.train(6, lambda _: None)
    backend = pretence.resumed(backend, 4, steps=8)  # that of step 6 was not completed
    assert (pretence.out / "jumps" / "0001").exists()
    assert not (pretence.out / "checkpoints" / "step-000005").exists()
    start = pretence.asked("start")[-1]["options"]
    assert start["trainer.resume_from_path"] == str(pretence.trainer / "checkpoints" / "global_step_4")
    torch.testing.assert_close(pretence.observe(backend, 5)[B], four[B] + 0.01 / 5)


def test_generated_accuracy_is_verls_own_validation(pretence: Pretence) -> None:
    backend = pretence.started(training={"evaluation": "generate"})
    assert backend.evaluate() == 0.25


def test_a_second_adapter_is_refused_before_training(pretence: Pretence) -> None:
    backend = pretence.prepared()
    backend.check_jumps("factors")
    with raises_kind("backend-unsupported", "space: factors"):
        backend.check_jumps("merged")
    full = pretence.prepared(training={"lora": None})
    full.check_jumps("merged")

"""From one trainer to the next with ``jump: merge``; the trainer is a pretended one."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from next_backends.openrlhf.merge_mode import MergeMode
from next_core.interfaces import CoefficientUpdate, Prediction
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from tests.backends.openrlhf.pretence import Pretence
from tests.errors import raises_kind

NAME = "layer.weight"


def started(pretence: Pretence, plan: dict[str, object] | None = None, **backend: object) -> MergeMode:
    mode: MergeMode = pretence.mode(plan, "merge", backend=backend)
    return mode


def jump(pretence: Pretence, mode: MergeMode, step: int) -> Path:
    """Continue from twice the last step, as the backend does."""
    source = FullModelSource(FullModelSourceConfig(path=pretence.out / "checkpoints", backbone=pretence.base))
    prediction = Prediction(source, step, 1, updates={NAME: CoefficientUpdate({step: 1.0, step - 1: -1.0})})
    folder = pretence.history.next_jump()
    pretence.history.write_jump(folder, step, 1.0, shift={NAME: torch.full((3, 4), 0.01)})
    mode.jump(step, prediction, 1.0)
    return folder


def jumped(pretence: Pretence) -> tuple[MergeMode, Path]:
    """A run that jumped after step 3."""
    mode = started(pretence)
    for step in (2, 3):
        mode.train(step)
        pretence.observe(mode, step)
    return mode, jump(pretence, mode, 3)


def value(found: Path | dict[str, torch.Tensor]) -> float:
    """The number that all weights have."""
    weight = (load_file(found / "model.safetensors") if isinstance(found, Path) else found)[NAME]
    assert bool((weight == weight[0, 0]).all())
    return float(weight[0, 0])


def models(pretence: Pretence) -> list[str]:
    """What each trainer began with."""
    return [start["options"]["--actor.model_name_or_path"] for start in pretence.asked("start")]


def test_a_trainer_ends_at_the_jump_and_the_next_one_begins_there(pretence: Pretence) -> None:
    mode = started(pretence)
    for step in (1, 2, 3):
        mode.train(step)
        pretence.observe(mode, step)
    jump(pretence, mode, 3)
    assert value(pretence.trainer / "model-000003") == pytest.approx(1.04)
    for step in (4, 5, 6):
        mode.train(step)
        pretence.observe(mode, step)
    for start, begin in zip(pretence.asked("start"), (0, 3), strict=True):
        options = start["options"]
        steps = int(options["--train.num_episodes"]) * int(options["--data.max_samples"])
        assert steps == 3 * int(options["--rollout.batch_size"])
        assert options["--ckpt.path"] == str(pretence.trainer / f"ckpt-{begin:06d}")
        assert (options["--train.seed"], options["--ckpt.save_steps"]) == (str(begin), "1")
        assert start["hooks"] == []
    assert models(pretence) == [str(pretence.base), str(pretence.trainer / "model-000003")]
    found = [value(pretence.out / "checkpoints" / f"step-{step:06d}") for step in range(1, 7)]
    assert found == pytest.approx([1.01, 1.02, 1.03, 1.05, 1.06, 1.07])
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3, 4, 5, 6]
    assert pretence.prompts()[0] == "6+1="


def test_without_a_jump_the_next_trainer_begins_with_the_trained_model(pretence: Pretence) -> None:
    mode = started(pretence)
    mode.train(3)
    mode.train(4)
    assert models(pretence)[1] == str(pretence.trainer / "ckpt-000000" / "global_step3_hf")


def test_models_are_read_once_they_are_whole_and_removed_after_the_next(pretence: Pretence) -> None:
    mode = started(pretence, {"slow": 0.3})
    states = pretence.trainer / "ckpt-000000"
    mode.train(1)
    assert value(pretence.observe(mode, 1)) == pytest.approx(1.01)
    assert (states / "global_step1_hf").exists()
    mode.train(2)
    assert value(pretence.observe(mode, 2)) == pytest.approx(1.02)
    assert not (states / "global_step1_hf").exists()
    assert not (states / "_actor" / "global_step1").exists()


@pytest.mark.parametrize(("masters", "note"), [(True, "fp32 masters"), (False, "bf16 weights")])
def test_checkpoints_are_the_masters_or_the_saved_model(pretence: Pretence, masters: bool, note: str) -> None:
    mode = started(pretence, masters=masters)
    mode.train(3)
    assert value(pretence.observe(mode, 3)) == pytest.approx(1.03)
    model = pretence.trainer / "ckpt-000000" / "global_step3_hf" / "model.safetensors"
    assert model.samefile(pretence.out / "checkpoints" / "step-000003" / "model.safetensors") is not masters
    assert note in mode.notes[0]
    assert ("--ckpt.disable_ds" in pretence.asked("start")[0]["options"]) is not masters


def test_masters_that_cannot_be_read_are_named(pretence: Pretence) -> None:
    mode = started(pretence, {"unreadable": True})
    mode.train(3)
    with raises_kind("checkpoint-damaged", "_actor/global_step3", "what is this?"):
        pretence.observe(mode, 3)


def test_a_step_without_a_model_is_an_error(pretence: Pretence) -> None:
    mode = started(pretence)
    mode.train(3)
    shutil.rmtree(pretence.trainer / "ckpt-000000")
    with raises_kind("checkpoint-incomplete", "ckpt-000000", "step 3"):
        pretence.observe(mode, 3)


def test_a_jump_is_undone_by_beginning_before_it(pretence: Pretence) -> None:
    mode, folder = jumped(pretence)
    mode.undo(3)
    assert not (pretence.trainer / "model-000003").exists()
    mode.train(4)
    assert models(pretence)[1].endswith("global_step3_hf")
    assert not mode.can_roll_back(folder)


def test_a_trainer_that_fails_is_reported_with_its_last_lines(pretence: Pretence) -> None:
    with raises_kind("backend-process-lost", "step 2", "status 1", "out of luck"):
        started(pretence, {"dies_in_step": 2}).train(2)


def test_closing_ends_the_trainer(pretence: Pretence) -> None:
    mode = started(pretence, {"slow": 0.5})
    mode.train(1)
    mode.close()
    assert not psutil.pid_exists(pretence.asked("start")[0]["pid"])
    assert not (pretence.trainer / "final").exists()
    mode.close()


def test_without_a_model_there_is_nothing_to_resume(pretence: Pretence) -> None:
    assert started(pretence).resume({3}) == 0


def test_resume_begins_with_the_newest_whole_model(pretence: Pretence) -> None:
    mode = started(pretence)
    mode.train(3)
    pretence.observe(mode, 3)
    mode.train(5)
    mode.close()  # before 4 and 5 were read
    states = pretence.trainer / "ckpt-000003"
    shutil.rmtree(states / "global_step3_hf", ignore_errors=True)
    (states / "global_step2_hf" / "tokenizer_config.json").unlink()
    mode = started(pretence)
    assert mode.resume({3}) == 4
    mode.start()
    assert value(pretence.out / "checkpoints" / "step-000004") == pytest.approx(1.04)
    mode.train(6)
    options = pretence.asked("start")[-1]["options"]
    assert options["--actor.model_name_or_path"] == str(states / "global_step1_hf")
    assert (options["--train.seed"], pretence.metrics()[-1]["step"]) == ("4", 6)
    assert value(pretence.observe(mode, 6)) == pytest.approx(1.06)


def test_resume_continues_from_an_active_jump(pretence: Pretence) -> None:
    jumped(pretence)
    mode = started(pretence)
    assert mode.resume({3}) == 3
    mode.train(4)
    assert value(pretence.observe(mode, 4)) == pytest.approx(1.05)


def test_resume_needs_the_model_of_an_active_jump(pretence: Pretence) -> None:
    jumped(pretence)
    shutil.rmtree(pretence.trainer / "model-000003")
    with raises_kind("checkpoint-not-found", "model-000003", "step 3"):
        started(pretence).resume({3})


def test_resume_removes_a_jump_that_the_run_does_not_know(pretence: Pretence) -> None:
    _, folder = jumped(pretence)
    mode = started(pretence)
    assert mode.resume(set()) == 3
    assert not folder.exists()
    mode.train(4)
    assert models(pretence)[-1] == str(pretence.trainer / "ckpt-000000" / "global_step3_hf")

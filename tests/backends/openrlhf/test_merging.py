"""From one trainer to the next with `jump: merge`; the trainer is a pretended one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from next_backends.openrlhf.merging import Merging
from next_core.errors import BackendError, CheckpointError
from next_core.interfaces import CoefficientUpdate, Prediction
from next_core.sources.full_model import FullModelSource, FullModelSourceConfig
from tests.backends.openrlhf.pretending import Pretence

NAME = "layer.weight"


@pytest.fixture
def pretence(tmp_path: Path) -> Iterator[Pretence]:
    with Pretence(tmp_path) as made:
        yield made


def started(pretence: Pretence, plan: dict[str, Any] | None = None, **backend: Any) -> Merging:
    block = {"jump": "merge", **backend}
    setting = pretence.setting(plan, backend=block, training={"lora": None}, save_every=None)
    return pretence.begun(Merging(setting))


def jump(pretence: Pretence, way: Merging, step: int) -> Path:
    """Go on from twice the last step, as the backend has it."""
    checkpoints, base = pretence.out / "checkpoints", pretence.out.parent / "base"
    source = FullModelSource(FullModelSourceConfig(path=checkpoints, backbone=base))
    prediction = Prediction(source, step, 1, updates={NAME: CoefficientUpdate({step: 1.0, step - 1: -1.0})})
    history = pretence.setting().history
    folder = history.next_jump()
    history.write_jump(folder, step, 1.0, shift={NAME: torch.full((3, 4), 0.01)})
    way.jump(step, folder, prediction, 1.0)
    return folder


def numbers(folder: Path) -> float:
    found = load_file(folder / "model.safetensors")[NAME]
    assert bool((found == found[0, 0]).all())
    return float(found[0, 0])


def numbers_of(tensors: dict[str, torch.Tensor]) -> float:
    return float(tensors[NAME][0, 0])


def test_a_trainer_ends_at_the_jump_and_the_next_one_begins_there(pretence: Pretence) -> None:
    way = started(pretence)
    for step in (1, 2, 3):
        way.train(step)
        pretence.observe(way, step)
    jump(pretence, way, 3)
    assert numbers(pretence.out / "trainer" / "model-000003") == pytest.approx(1.04)
    for step in (4, 5, 6):
        way.train(step)
        pretence.observe(way, step)
    first, second = (start["options"] for start in pretence.asked("start"))
    for options, begin in ((first, 0), (second, 3)):
        batch = int(options["--rollout.batch_size"])
        assert int(options["--train.num_episodes"]) * int(options["--data.max_samples"]) == 3 * batch
        assert options["--ckpt.path"] == str(pretence.out / "trainer" / f"ckpt-{begin:06d}")
        assert (options["--train.seed"], options["--ckpt.save_steps"]) == (str(begin), "1")
    assert first["--actor.model_name_or_path"] == str(pretence.out.parent / "base")
    assert second["--actor.model_name_or_path"] == str(pretence.out / "trainer" / "model-000003")
    assert [start["hooks"] for start in pretence.asked("start")] == [[], []]
    found = [numbers(pretence.out / "checkpoints" / f"step-{step:06d}") for step in range(1, 7)]
    assert found == pytest.approx([1.01, 1.02, 1.03, 1.05, 1.06, 1.07])
    assert [record["step"] for record in pretence.metrics()] == [1, 2, 3, 4, 5, 6]
    first_prompt = json.loads((pretence.out / "trainer" / "prompts.jsonl").read_text().splitlines()[0])
    assert first_prompt["prompt"] == "6+1="


def test_without_a_jump_the_next_trainer_begins_with_what_was_trained(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    way.train(4)
    model = pretence.out / "trainer" / "ckpt-000000" / "global_step3_hf"
    assert pretence.asked("start")[1]["options"]["--actor.model_name_or_path"] == str(model)


def test_checkpoints_are_taken_over_once_they_are_whole_while_training_goes_on(pretence: Pretence) -> None:
    way = started(pretence, {"slow": 0.3})
    way.train(1)
    assert numbers_of(pretence.observe(way, 1)) == pytest.approx(1.01)
    states = pretence.out / "trainer" / "ckpt-000000"
    assert (states / "global_step1_hf").exists()  # until a later one is there
    way.train(2)
    assert numbers_of(pretence.observe(way, 2)) == pytest.approx(1.02)
    assert not (states / "global_step1_hf").exists()
    assert not (states / "_actor" / "global_step1").exists()


def test_masters_are_the_checkpoint_where_deepspeed_kept_them(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    assert numbers_of(pretence.observe(way, 3)) == pytest.approx(1.03)
    model = pretence.out / "trainer" / "ckpt-000000" / "global_step3_hf" / "model.safetensors"
    assert not model.samefile(pretence.out / "checkpoints" / "step-000003" / "model.safetensors")
    assert list(way.notes) == ["checkpoints are DeepSpeed's fp32 masters"]


def test_without_masters_the_saved_model_is_the_checkpoint(pretence: Pretence) -> None:
    way = started(pretence, masters=False)
    way.train(3)
    pretence.observe(way, 3)
    assert list(way.notes) == ["checkpoints are the bf16 weights that OpenRLHF saves"]
    model = pretence.out / "trainer" / "ckpt-000000" / "global_step3_hf" / "model.safetensors"
    assert model.samefile(pretence.out / "checkpoints" / "step-000003" / "model.safetensors")
    assert "--ckpt.disable_ds" in pretence.asked("start")[0]["options"]


def test_masters_that_cannot_be_read_are_named(pretence: Pretence) -> None:
    way = started(pretence, {"unreadable": True})
    way.train(3)
    with pytest.raises(CheckpointError, match=r"_actor/global_step3: DeepSpeed cannot read it: what is this\?"):
        pretence.observe(way, 3)


def test_a_step_without_a_model_is_an_error(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    shutil.rmtree(pretence.out / "trainer" / "ckpt-000000")
    with pytest.raises(CheckpointError, match="ckpt-000000 has no whole model of step 3"):
        pretence.observe(way, 3)


def test_a_jump_is_taken_back_by_beginning_before_it(pretence: Pretence) -> None:
    way = started(pretence)
    for step in (2, 3):
        way.train(step)
        pretence.observe(way, step)
    folder = jump(pretence, way, 3)
    way.take_back(3, 3, folder)
    assert not (pretence.out / "trainer" / "model-000003").exists()
    way.train(4)
    assert pretence.asked("start")[1]["options"]["--actor.model_name_or_path"].endswith("global_step3_hf")
    assert not way.rollback_is_kept(folder)


def test_a_trainer_that_fails_is_told_with_its_last_lines(pretence: Pretence) -> None:
    way = started(pretence, {"dies_in_step": 2})
    with pytest.raises(BackendError, match=r"(?s)ended before step 2, with status 1.*out of luck"):
        way.train(2)


def test_closing_ends_the_trainer(pretence: Pretence) -> None:
    way = started(pretence, {"slow": 0.5})
    way.train(1)
    (start,) = pretence.asked("start")
    way.close()
    with pytest.raises(ProcessLookupError):
        os.kill(start["pid"], 0)
    assert not (pretence.out / "trainer" / "final").exists()
    way.close()


def test_nothing_was_trained_nothing_is_resumed(pretence: Pretence) -> None:
    assert started(pretence).resume({3}) == 0


def test_resume_begins_with_the_newest_whole_model(pretence: Pretence) -> None:
    way = started(pretence)
    way.train(3)
    pretence.observe(way, 3)
    way.train(4)
    way.train(5)
    way.close()  # before 4 and 5 were taken over
    shutil.rmtree(pretence.out / "trainer" / "ckpt-000003" / "global_step3_hf", ignore_errors=True)
    (pretence.out / "trainer" / "ckpt-000003" / "global_step2_hf" / "tokenizer_config.json").unlink()
    way = started(pretence)
    assert way.resume({3}) == 4
    way.start()
    assert numbers(pretence.out / "checkpoints" / "step-000004") == pytest.approx(1.04)
    way.train(6)
    options = pretence.asked("start")[-1]["options"]
    model = pretence.out / "trainer" / "ckpt-000003" / "global_step1_hf"
    assert options["--actor.model_name_or_path"] == str(model)
    assert (options["--train.seed"], pretence.metrics()[-1]["step"]) == ("4", 6)
    assert numbers_of(pretence.observe(way, 6)) == pytest.approx(1.06)


def test_resume_goes_on_from_a_jump_that_stands(pretence: Pretence) -> None:
    way = started(pretence)
    for step in (2, 3):
        way.train(step)
        pretence.observe(way, step)
    jump(pretence, way, 3)
    way.close()
    way = started(pretence)
    assert way.resume({3}) == 3
    way.train(4)
    assert numbers_of(pretence.observe(way, 4)) == pytest.approx(1.05)


def test_the_model_of_a_jump_that_is_gone_is_missed(pretence: Pretence) -> None:
    way = started(pretence)
    for step in (2, 3):
        way.train(step)
        pretence.observe(way, step)
    jump(pretence, way, 3)
    shutil.rmtree(pretence.out / "trainer" / "model-000003")
    with pytest.raises(CheckpointError, match="model-000003 is gone, the model after the jump at step 3; restore it"):
        started(pretence).resume({3})


def test_a_jump_that_the_run_does_not_know_of_is_forgotten(pretence: Pretence) -> None:
    way = started(pretence)
    for step in (2, 3):
        way.train(step)
        pretence.observe(way, step)
    folder = jump(pretence, way, 3)
    way = started(pretence)
    assert way.resume(set()) == 3
    assert not folder.exists()
    way.train(4)
    model = pretence.out / "trainer" / "ckpt-000000" / "global_step3_hf"
    assert pretence.asked("start")[-1]["options"]["--actor.model_name_or_path"] == str(model)

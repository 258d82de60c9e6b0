"""The folders of every trainer are found, and read alike."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.mathematics.low_rank import dense
from next_core.storage.atomic import seal
from tests.conftest import STEPS, LoraRun
from tests.errors import raises_kind
from tests.sources.models import adapter


def openrlhf(source: Path, root: Path, step: int) -> Path:
    target = Path(shutil.copytree(source, root / f"global_step{step}_hf"))
    (target / "tokenizer_config.json").write_text("{}")
    return target


def verl(source: Path, root: Path, step: int) -> Path:
    return Path(shutil.copytree(source, root / f"global_step_{step}" / "actor" / "lora_adapter"))


def ours(source: Path, root: Path, step: int) -> Path:
    target = Path(shutil.copytree(source, root / f"step-{step:06d}"))
    seal(target)
    return target


def written_by(write: Callable[[Path, Path, int], Path], run: LoraRun, root: Path) -> Path:
    (root / "_actor").mkdir(parents=True)  # a trainer's folder contains more than checkpoints
    for step in STEPS:
        write(run.folder(step), root, step)
    return root


@pytest.mark.parametrize("write", [openrlhf, verl, ours])
def test_every_trainers_adapters_are_read(
    lora_run: LoraRun, tmp_path: Path, write: Callable[[Path, Path, int], Path]
) -> None:
    source, expected = open_checkpoints(written_by(write, lora_run, tmp_path / "x")), open_checkpoints(lora_run.path)
    assert source.name == "peft-adapter"
    assert source.steps == expected.steps
    assert source.parameters == expected.parameters
    for parameter in source.parameters:
        one, other = (dense(s.delta(parameter.name, STEPS[-1], STEPS[0])) for s in (source, expected))
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", ["global_step{}_hf", "global_step_{}/actor/huggingface", "checkpoint-{}"])
def test_full_models_of_every_trainer_are_read(tmp_path: Path, place: str) -> None:
    for step in (0, 10, 20):
        folder = tmp_path / place.format(step)
        folder.mkdir(parents=True)
        (folder / "tokenizer_config.json").write_text("{}")
        save_file({"w.weight": torch.full((3, 2), float(step))}, folder / "model.safetensors")
    source = open_checkpoints(tmp_path)
    assert (source.name, source.steps) == ("full-model", (10, 20))
    assert torch.equal(dense(source.delta("w.weight", 20, 10)), torch.full((3, 2), 10.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["checkpoint-{}", "step_{}"])
@pytest.mark.parametrize("others", [(), ("ref", "jump-1")])
def test_the_one_named_adapter_of_each_checkpoint_is_read(tmp_path: Path, name: str, others: tuple[str, ...]) -> None:
    """PEFT saves an adapter that is not called "default" in a subfolder; TRL adds a reference, we add jumps."""
    for step in (10, 20):
        for adapter_name in ("policy", *others):
            adapter(tmp_path / name.format(step) / adapter_name, step)
    source = open_checkpoints(tmp_path)
    assert source.steps == (10, 20)
    assert source.naming == f"{name.format('N')}/policy"


def test_checkpoints_next_to_a_final_adapter_are_the_steps(tmp_path: Path) -> None:
    """As accelerate's examples save them: ``step_N`` inside the folder of the final weights."""
    adapter(tmp_path / "out", 30)
    for step in (10, 20):
        adapter(tmp_path / f"out/step_{step}", step)
    assert open_checkpoints(tmp_path / "out").steps == (10, 20)


@pytest.mark.parametrize(
    ("places", "listed"),
    [
        (("checkpoint-{}/policy", "checkpoint-{}/value"), "checkpoint-10/policy"),
        (("epoch_{}", ""), "epoch_10"),
        (("checkpoint-{}/adapters/policy",), "checkpoint-10/adapters/policy"),
    ],
)
def test_without_a_layout_the_message_says_how_to_list_folders(
    tmp_path: Path, places: tuple[str, ...], listed: str
) -> None:
    for step in (10, 20):
        for place in places:
            made = adapter(tmp_path / f"made/{step}{place}", step)
            shutil.copytree(made, tmp_path / "run" / place.format(step), dirs_exist_ok=True)
    with raises_kind("checkpoint-unknown-layout", f"--checkpoints {tmp_path / 'run' / listed}"):
        open_checkpoints(tmp_path / "run")
    one = [tmp_path / "run" / places[0].format(step) for step in (10, 20)]
    assert open_checkpoints(one).steps == (10, 20)


def test_the_run_below_a_folder_is_suggested(tmp_path: Path) -> None:
    for step in (10, 20):
        adapter(tmp_path / f"a/out/checkpoint-{step}", step)
    with raises_kind("checkpoint-unknown-layout", f"did you mean {tmp_path / 'a/out'}?"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("global_step_10/actor/dist_ckpt/common.pt", "--local_dir {}/global_step_10/actor --target_dir"),
        ("global_step_10/actor/model/dist_ckpt/common.pt", "--local_dir {}/global_step_10/actor --target_dir"),
        ("checkpoint-10/global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py {}/checkpoint-10 "),
        ("checkpoint-10/pytorch_model_fsdp_0_rank0.bin", "SHARDED_STATE_DICT"),
        ("step_10/policy/weights/model/shard-00001-model-00001-of-00001.safetensors", "save_consolidated"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_what_other_trainers_save_is_refused_by_name(tmp_path: Path, place: str, remedy: str, listed: bool) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_bytes(b"")
    step = tmp_path / place.split("/")[0]
    with raises_kind("checkpoint-unknown-layout", step, remedy.format(tmp_path)):
        open_checkpoints([step] if listed else tmp_path)


@pytest.mark.parametrize("place", ["policy/weights/model", "policy/weights/model/consolidated"])
def test_what_nemo_rl_exports_is_read(lora_run: LoraRun, tmp_path: Path, place: str) -> None:
    for step in STEPS:
        shutil.copytree(lora_run.folder(step), tmp_path / f"step_{step}" / place)
        (tmp_path / f"step_{step}" / "policy" / "tokenizer").mkdir()
    source = open_checkpoints(tmp_path)
    assert (source.naming, source.steps) == (f"step_N/{place}", tuple(STEPS))


def test_a_step_of_prime_rl_is_complete_once_it_is_stable(lora_run: LoraRun, tmp_path: Path) -> None:
    for step in STEPS:
        folder = Path(shutil.copytree(lora_run.folder(step), tmp_path / "weights" / f"step_{step}"))
        if step < STEPS[-1]:
            (folder / "STABLE").touch()
    with raises_kind("checkpoint-incomplete", f"step_{STEPS[-1]}", "STABLE"):
        open_checkpoints(tmp_path / "weights")
    assert open_checkpoints(tmp_path / "weights", skip_damaged=True).steps == tuple(STEPS[:-1])

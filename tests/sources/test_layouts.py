"""The folders of every trainer are found, and read alike."""

import shutil
from pathlib import Path

import pytest

from next_core import open_checkpoints
from tests.conftest import STEPS, LoraRun
from tests.errors import raises_kind
from tests.sources.models import adapter


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
def test_without_a_layout_the_message_lists_folders(tmp_path: Path, places: tuple[str, ...], listed: str) -> None:
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

"""Which of OpenRLHF's folders are whole, and which are kept."""

import shutil
from pathlib import Path

import pytest
import torch

from next_backends.openrlhf.saved_states import newest_state, remove_old_models

PARTS = ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def state(folder: Path, start: int, step: int) -> Path:
    """As DeepSpeed leaves one."""
    made = folder / f"ckpt-{start:06d}" / "_actor" / f"global_step{step}"
    made.mkdir(parents=True)
    for name in PARTS:
        torch.save({"weight": torch.ones(100)}, made / name)
    return made


def model(folder: Path, start: int, step: int, whole: bool = True) -> Path:
    made = folder / f"ckpt-{start:06d}" / f"global_step{step}_hf"
    made.mkdir(parents=True)
    if whole:
        (made / "tokenizer_config.json").write_text("{}")
    return made


def test_the_newest_state_of_all_trainers_is_found_whatever_latest_says(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "missing") is newest_state(tmp_path) is None
    state(tmp_path, 0, 4)
    (state(tmp_path, 0, 10).parent / "latest").write_text("global_step4")
    assert newest_state(tmp_path) == (0, 10)
    state(tmp_path, 10, 12)
    assert newest_state(tmp_path) == (10, 12)


@pytest.mark.parametrize("lost", PARTS)
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_torn_state_does_not_count_and_the_one_before_it_does(tmp_path: Path, lost: str, how: str) -> None:
    state(tmp_path, 0, 4)
    torn = state(tmp_path, 0, 6) / lost
    whole = torn.read_bytes()
    torn.unlink()
    if how != "missing":
        torn.write_bytes(whole[:-30] if how == "cut" else b"")
    assert newest_state(tmp_path) == (0, 4)


def test_foreign_folders_do_not_count(tmp_path: Path) -> None:
    whole = state(tmp_path, 0, 6)
    for name in ("ckpt-", "ckpt-old", "my-ckpt-000004", "model-000003"):
        shutil.copytree(whole, tmp_path / name / "_actor" / "global_step9")
    shutil.copytree(whole, whole.parent / "step9")
    shutil.copytree(whole, whole.parent / "global_step9_hf")
    (tmp_path / "ckpt-000007").write_text("a file")
    assert newest_state(tmp_path) == (0, 6)


def test_all_but_the_newest_models_are_removed(tmp_path: Path) -> None:
    kept = [model(tmp_path, 10, 12), model(tmp_path, 10, 14, whole=False)]
    kept += [tmp_path / "ckpt-mine" / "global_step1_hf", *(model(tmp_path, 0, step) for step in (2, 4, 10))][::3]
    (tmp_path / "ckpt-mine" / "global_step1_hf").mkdir(parents=True)
    for _ in range(2):
        remove_old_models(tmp_path, 2)
        assert sorted(tmp_path.glob("*/*_hf")) == sorted(kept)

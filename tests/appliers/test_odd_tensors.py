"""Tensors besides matrices of floats are copied, or refused before anything is written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import History, make_applier, make_predictor, open_checkpoints
from next_core.interfaces import CoefficientUpdate, Prediction
from tests.conftest import LoraRun, noise
from tests.errors import raises_kind

MODEL = "model.safetensors"
W = "layers.0.w.weight"


def odd(step: int) -> dict[str, Tensor]:
    """Every kind of tensor that a transformers model may store."""
    return {
        "position_ids": torch.arange(6).reshape(2, 3) + step,
        "num_batches_tracked": torch.tensor(step),
        "logit_scale": torch.tensor(2.5 + step).bfloat16(),
        "mask": torch.tensor([[True, False], [step > 0, True]]),
        "eighths": (noise("e", 4, 4) + step).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([1, 2**15 + step]).to(torch.uint16),
        "norm.weight": torch.full((4,), 1.0 + step),
        W: noise("w", 4, 6) + step,
    }


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A full-parameter run in ``checkpoints``, its backbone in ``base``."""
    for step in (10, 20):
        save(tmp_path / "checkpoints" / f"checkpoint-{step}", odd(step))
    save(tmp_path / "base", odd(0) | {"frozen_ids": torch.arange(3), "frozen_scale": torch.tensor(3.0)})
    return tmp_path


def jump(folder: Path, *names: str) -> Prediction:
    source = open_checkpoints(folder / "checkpoints", backbone=folder / "base")
    return Prediction(source, 20, 10, updates={n: CoefficientUpdate({20: 1.0, 10: -1.0}) for n in names or (W,)})


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}])
def test_integers_scalars_and_8_bit_floats_are_the_newest(folder: Path, options: dict[str, Any]) -> None:
    make_applier("merged-model", **options).apply(jump(folder), out=folder / "out")
    written, backbone = load_file(folder / "out" / MODEL), load_file(folder / "base" / MODEL)
    assert written.keys() == backbone.keys()
    assert all(same(written[name], value) for name, value in odd(20).items() if name != W)
    assert all(same(written[name], backbone[name]) for name in ("frozen_ids", "frozen_scale"))
    torch.testing.assert_close(written[W], odd(20)[W] + 10)


def test_an_adapter_is_merged_into_a_backbone_that_has_such_tensors_too(lora_run: LoraRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(lora_run.base, tmp_path / "base"))
    more = {name: value for name, value in odd(0).items() if name != W}
    save(base, load_file(base / MODEL) | more)
    make_applier("merged-model").apply(Prediction(open_checkpoints(lora_run.path, base), 60, 10), out=tmp_path / "out")
    written = load_file(tmp_path / "out" / MODEL)
    assert all(same(written[name], value) for name, value in more.items())


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(2, 3).int(), torch.zeros(3, 2).long()])
def test_a_tensor_that_the_backbone_stores_differently_is_refused_before_writing(folder: Path, other: Tensor) -> None:
    save(folder / "base", odd(0) | {"position_ids": other})
    source = open_checkpoints(folder / "checkpoints")
    kind = "other-model" if other.shape == (3, 2) else "unsupported-model"
    with raises_kind(f"checkpoint-{kind}", "'position_ids'"):
        make_applier("merged-model", backbone=folder / "base").check_source(source, folder / "out")


def test_a_jump_of_a_matrix_in_8_bits_is_refused_before_writing(folder: Path) -> None:
    with raises_kind("checkpoint-unsupported-model", "'eighths'", "float8_e4m3fn"):
        make_applier("merged-model").check(jump(folder, W, "eighths"), folder / "out")


def test_a_pickled_backbone_is_refused(lora_run: LoraRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(lora_run.base, tmp_path / "base"))
    torch.save(load_file(base / MODEL), base / "pytorch_model.bin")
    (base / MODEL).unlink()
    source = open_checkpoints(lora_run.path, base, allow_pickle=True)
    with raises_kind("checkpoint-pickle", base / "pytorch_model.bin", "save_pretrained"):
        make_applier("merged-model").check_source(source, tmp_path / "out")


def test_a_step_0_that_was_kept_is_where_rl_began_and_no_step_of_the_jump(tmp_path: Path) -> None:
    start, before, velocity = noise("w", 4, 6), noise("v0", 4, 6), noise("v", 4, 6)
    save(tmp_path / "base", {W: start})
    for step in (0, 10, 20):
        save(tmp_path / "checkpoints" / f"checkpoint-{step}", {W: start + before + step / 10 * velocity})
    source = open_checkpoints(tmp_path / "checkpoints", backbone=tmp_path / "base")
    by_secant = make_predictor("secant", window=20).fit(History(source)).predict(10)
    explicit = Prediction(source, 20, 10, updates={W: CoefficientUpdate({20: 0.5, 0: -0.5})})
    for name, prediction in (("secant", by_secant), ("explicit", explicit)):
        make_applier("merged-model").apply(prediction, out=tmp_path / name)
        torch.testing.assert_close(load_file(tmp_path / name / MODEL)[W], start + before + 3 * velocity)


def test_of_a_list_only_the_listed_folders_are_being_read(folder: Path) -> None:
    listed = [folder / "checkpoints" / f"checkpoint-{step}" for step in (10, 20)]
    source = open_checkpoints(listed, backbone=folder / "base")
    applier = make_applier("merged-model")
    assert applier.check_source(source, folder / "checkpoints" / "out") == folder / "checkpoints" / "out"
    for path in listed:
        with raises_kind("config-contradiction", path):
            applier.check_source(source, path / "out")


def test_a_dry_run_may_name_an_existing_folder_but_none_that_is_read(folder: Path) -> None:
    source = open_checkpoints(folder / "checkpoints", backbone=folder / "base")
    applier = make_applier("merged-model")
    (folder / "out").mkdir()
    assert applier.check_source(source, folder / "out", dry_run=True) == folder / "out"
    with raises_kind("config-folder-not-empty", folder / "out"):
        applier.check_source(source, folder / "out")
    with raises_kind("config-contradiction", folder / "base"):
        applier.check_source(source, folder / "base", dry_run=True)

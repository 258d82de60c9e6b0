"""Weights replaced shard by shard in a folder that is there: never half a file, and finished by running again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import make_applier, open_checkpoints
from next_core.appliers import merged_model
from next_core.errors import CheckpointError, ConfigError, GuardError, NextCoreError
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.storage.manifest import INCOMPLETE, check_manifest
from tests.conftest import LoraRun


@pytest.fixture(scope="module")
def run(make_lora_run: Callable[..., LoraRun], tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    return make_lora_run(tmp_path_factory.mktemp("run") / "checkpoints", (0, 10, 20))


@pytest.fixture
def target(base: Path, tmp_path: Path) -> Path:
    """Another copy of the model, in several shards."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "target", max_shard_size="8KB")
    return tmp_path / "target"


def predict(run: LoraRun) -> Prediction:
    source = open_checkpoints(run.path, backbone=run.base)
    return Prediction(source, 20, 10, updates={n: CoefficientUpdate({20: 1.0, 10: -1.0}) for n in run.deltas[20]})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for shard in sorted(folder.glob("*.safetensors")) for key, value in load_file(shard).items()}


def in_place(run: LoraRun, target: Path, **options: Any) -> Any:
    return make_applier("merged-model", in_place=True, **options).apply(predict(run), 1.5, out=target)


def test_the_weights_are_those_of_a_new_folder_and_the_layout_is_the_folders_own(
    run: LoraRun, target: Path, tmp_path: Path
) -> None:
    shards = {path.name for path in target.glob("*.safetensors")}
    in_place(run, target)
    make_applier("merged-model").apply(predict(run), 1.5, out=tmp_path / "new")
    there, new = weights(target), weights(tmp_path / "new")
    assert there.keys() == new.keys()
    assert all(torch.equal(there[key], new[key]) for key in new)
    assert {path.name for path in target.glob("*.safetensors")} == shards
    assert len(shards) > 2
    assert not (target / INCOMPLETE).exists()
    assert not list(target.glob(".*"))
    check_manifest(target)
    assert json.loads((target / "extrapolation.json").read_text())["settings"]["in_place"] is True


def test_what_was_interrupted_is_marked_and_finished_by_running_again(
    run: LoraRun, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = merged_model.atomic_file, []

    def killed(path: Path) -> Any:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path)

    before = weights(target)
    monkeypatch.setattr(merged_model, "atomic_file", killed)
    with pytest.raises(KeyboardInterrupt):
        in_place(run, target)
    assert json.loads((target / INCOMPLETE).read_text())["alpha"] == 1.5
    assert not (target / "manifest.json").exists()
    with pytest.raises(CheckpointError, match="partly old; run that again first"):
        make_applier("merged-model", backbone=target).apply(predict(run), out=tmp_path / "next")
    half = weights(target)  # every file is whole
    assert half.keys() == before.keys()
    changed = [key for key in before if not torch.equal(half[key], before[key])]
    assert 0 < len(changed) < len(run.deltas[20])
    monkeypatch.undo()
    in_place(run, target)
    make_applier("merged-model").apply(predict(run), 1.5, out=tmp_path / "new")
    new = weights(tmp_path / "new")
    assert all(torch.equal(value, new[key]) for key, value in weights(target).items())
    assert not (target / INCOMPLETE).exists()


def test_a_file_that_is_mapped_by_somebody_keeps_its_old_bytes(run: LoraRun, target: Path) -> None:
    mapped = weights(target)
    kept = {key: value.clone() for key, value in mapped.items()}
    in_place(run, target)
    assert all(torch.equal(mapped[key], kept[key]) for key in kept)


def test_what_is_read_is_not_replaced_and_what_is_not_there_neither(run: LoraRun, tmp_path: Path) -> None:
    for folder in (run.base, run.folder(20), run.path):
        with pytest.raises(ConfigError, match="which is being read"):
            in_place(run, folder)
    with pytest.raises(ConfigError, match="does not exist"):
        in_place(run, tmp_path / "none")


@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_a_folder_of_another_model_is_refused_before_anything_changes(
    run: LoraRun, tmp_path: Path, change: str
) -> None:
    other = Path(shutil.copytree(run.base, tmp_path / "other"))
    tensors = load_file(run.base / "model.safetensors")
    name = "model.norm.weight"
    value = tensors.pop(name)
    tensors |= {"shape": {name: value[:-1].clone()}, "missing": {}, "more": {name: value, "more": value.clone()}}[
        change
    ]
    save_file(tensors, other / "model.safetensors")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(ConfigError, match="in this shape"):
        in_place(run, other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_a_jump_that_overflows_says_what_became_of_the_folder(run: LoraRun, target: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    huge = LowRankUpdate(LowRank(torch.full((16, 1), 1e30), torch.full((1, 24), 1e30)))
    prediction = Prediction(open_checkpoints(run.path, run.base), 20, 10, updates={name: huge})
    with pytest.raises(GuardError, match=f"'{name}' overflows.*is partly old"):
        make_applier("merged-model", in_place=True).apply(prediction, out=target)
    assert (target / INCOMPLETE).exists()


def test_it_cannot_be_taken_back(run: LoraRun, target: Path) -> None:
    applied = in_place(run, target)
    with pytest.raises(NextCoreError, match="written in place"):
        applied.rollback()
    assert target.exists()


def test_a_card_that_is_not_utf_8_keeps_its_bytes(run: LoraRun, target: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.base, tmp_path / "base"))
    (base / "README.md").write_bytes(b"caf\xe9\n")
    make_applier("merged-model", in_place=True, backbone=base).apply(predict(run), out=target)
    assert (target / "README.md").read_bytes().startswith(b"caf\xe9\n")
    assert not (target / INCOMPLETE).exists()


def test_a_card_that_cannot_be_read_ends_it_before_anything_changes(
    run: LoraRun, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> dict[str, str]:
        raise PermissionError("README.md")

    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr(merged_model, "record_texts", unreadable)
    with pytest.raises(PermissionError):
        in_place(run, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_what_a_killed_process_left_of_a_shard_is_removed(run: LoraRun, target: Path, dead: int) -> None:
    shard = next(target.glob("*.safetensors"))
    left = target / f".{shard.name}.tmp-{dead}"
    left.write_bytes(b"half")
    in_place(run, target)
    assert not left.exists()

"""Weights replaced shard by shard in an existing folder: no file is ever half written; a repeat finishes the job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import make_applier
from next_core.appliers import merged_model
from next_core.errors import ConfigError
from next_core.interfaces import LowRankUpdate
from next_core.mathematics.low_rank import LowRank
from next_core.storage.manifest import INCOMPLETE, check_manifest
from tests.appliers.conftest import secant
from tests.conftest import LoraRun
from tests.errors import raises_kind


@pytest.fixture
def target(base: Path, tmp_path: Path) -> Path:
    """Another copy of the model, in several shards."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "target", max_shard_size="8KB")
    return tmp_path / "target"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for shard in sorted(folder.glob("*.safetensors")) for key, value in load_file(shard).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_place(run: LoraRun, target: Path, **options: Any) -> Any:
    return make_applier("merged-model", in_place=True, **options).apply(secant(run), 1.5, out=target)


def in_new_folder(run: LoraRun, folder: Path) -> dict[str, torch.Tensor]:
    make_applier("merged-model").apply(secant(run), 1.5, out=folder)
    return weights(folder)


def test_the_weights_are_those_of_a_new_folder_in_the_targets_own_layout(
    run: LoraRun, target: Path, tmp_path: Path, dead: int
) -> None:
    files, mapped = {path.name for path in target.iterdir()}, weights(target)
    kept = {key: value.clone() for key, value in mapped.items()}
    (target / f".{next(target.glob('*.safetensors')).name}.tmp-{dead}").write_bytes(b"half")
    (target / "generation_config.json").write_text('{"own": 1}')
    applied = in_place(run, target)
    there, new = weights(target), in_new_folder(run, tmp_path / "new")
    assert there.keys() == new.keys()
    assert all(torch.equal(there[key], new[key]) for key in new)
    assert all(torch.equal(mapped[key], kept[key]) for key in kept)  # whoever mapped a file keeps its old bytes
    written = {"README.md", "extrapolation.json", "manifest.json"}
    assert {path.name for path in target.iterdir()} == files | written | {"generation_config.json"}
    assert (target / "generation_config.json").read_text() == '{"own": 1}'
    check_manifest(target, contents=True)
    assert json.loads((target / "extrapolation.json").read_text())["settings"]["in_place"] is True
    with raises_kind("config-contradiction", target):
        applied.rollback()
    assert target.exists()


def test_an_interrupted_export_is_marked_and_finished_by_a_repeat(
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
    with raises_kind("checkpoint-incomplete", target):
        make_applier("merged-model", backbone=target).apply(secant(run), out=tmp_path / "next")
    half = weights(target)  # every file is whole
    assert half.keys() == before.keys()
    assert 0 < sum(not torch.equal(half[key], before[key]) for key in before) < len(run.deltas[20])
    monkeypatch.undo()
    in_place(run, target)
    new = in_new_folder(run, tmp_path / "new")
    assert all(torch.equal(value, new[key]) for key, value in weights(target).items())
    assert not (target / INCOMPLETE).exists()


@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_a_folder_of_another_model_is_refused_before_anything_changes(
    run: LoraRun, tmp_path: Path, change: str
) -> None:
    other, name = Path(shutil.copytree(run.base, tmp_path / "other")), "model.norm.weight"
    tensors = load_file(run.base / "model.safetensors")
    value = tensors.pop(name)
    tensors |= {"shape": {name: value[:-1].clone()}, "missing": {}, "more": {name: value, "more": value.clone()}}[
        change
    ]
    save_file(tensors, other / "model.safetensors")
    before = contents(other)
    with raises_kind("checkpoint-other-model", other, "more" if change == "more" else name):
        in_place(run, other)
    assert contents(other) == before


def test_a_target_that_is_read_or_missing_is_refused(run: LoraRun, tmp_path: Path) -> None:
    for folder in (run.base, run.folder(20), run.path):
        with raises_kind("config-contradiction", folder):
            in_place(run, folder)
    with raises_kind("config-missing-file", "none"):
        in_place(run, tmp_path / "none")


def test_a_jump_that_overflows_names_the_folder_that_is_now_mixed(run: LoraRun, target: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    huge = LowRankUpdate(LowRank(torch.full((16, 1), 1e30), torch.full((1, 24), 1e30)))
    with raises_kind("numbers-overflow", name, target):
        make_applier("merged-model", in_place=True).apply(secant(run, updates={name: huge}), out=target)
    assert (target / INCOMPLETE).exists()


def test_an_unreadable_card_is_an_error_before_anything_changes(
    run: LoraRun, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> dict[str, str]:
        raise ConfigError("README.md")

    before = contents(target)
    monkeypatch.setattr(merged_model, "record_texts", unreadable)
    with pytest.raises(ConfigError):
        in_place(run, target)
    assert contents(target) == before

"""Weights that FSDP sharded, as verl and SkyRL save them: joined exactly, or refused by name."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

from next_core import open_checkpoints
from next_core.mathematics.low_rank import dense
from next_core.sources.fsdp_shards import open_shards
from next_core.sources.hf_model import ModelFiles
from tests.errors import raises_kind
from tests.sources.fsdp import lora_state, save_shards, verl
from tests.sources.models import MODULE, Hostile, adapter

WHOLE = {
    "rows": torch.randn(5, 3),
    "wide": torch.randn(2, 6).bfloat16(),
    "stack": torch.randn(4, 3, 2),
    "bias": torch.randn(7),
}
STEPS = (10, 20)


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((1,), [Shard(0)]),
        ((2,), [Shard(0)]),
        ((4,), [Shard(0)]),  # 5 rows in parts of 2, 2, 1 and 0
        ((3,), [Replicate()]),
        ((2, 2), [Replicate(), Shard(0)]),  # hybrid sharding
        ((2, 3), [Shard(0), Replicate()]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_way_of_sharding_is_joined(tmp_path: Path, mesh: Any, placements: Any, device: str) -> None:
    buffer = {"scalar": torch.tensor(3.0), "buffer": torch.randn(3)}
    file = open_shards(save_shards(tmp_path, WHOLE, mesh, placements, buffer, device), allow_pickle=True)
    expected = WHOLE | buffer
    assert file.shapes == {name: tuple(value.shape) for name, value in expected.items()}
    for name, value in expected.items():
        assert file.dtype(name) == value.dtype
        assert torch.equal(file.raw(name), value)
    for name in ("rows", "wide", "bias"):
        for begin in range(6):
            for end in range(begin, 8):
                assert torch.equal(file.raw(name, slice(begin, end)), WHOLE[name][begin:end])
    assert torch.equal(file.raw("stack", (3, slice(1, 3))), WHOLE["stack"][3, 1:3])


def test_shards_along_columns_are_joined(tmp_path: Path) -> None:
    whole = {"rows": torch.randn(3, 5), "stack": torch.randn(3, 4, 2)}
    file = open_shards(save_shards(tmp_path, whole, (2,), [Shard(1)]), allow_pickle=True)
    assert torch.equal(file.raw("rows"), whole["rows"])
    assert torch.equal(file.raw("rows", slice(1, 2)), whole["rows"][1:2])
    assert torch.equal(file.raw("stack", (1, slice(1, 4))), whole["stack"][1, 1:4])


def test_a_mesh_of_another_version_of_torch_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    state: Callable[[Any], dict[str, Any]] = DeviceMesh.__getstate__
    monkeypatch.setattr(DeviceMesh, "__getstate__", lambda mesh: state(mesh) | {"_layout": None, "_rank_map": None})
    assert torch.equal(open_shards(save_shards(tmp_path, WHOLE), allow_pickle=True).raw("rows"), WHOLE["rows"])


def name(rank: int, world: int = 2) -> str:
    return f"model_world_size_{world}_rank_{rank}.pt"


def with_another(rank: int, tensors: Mapping[str, Tensor] = WHOLE, **how: Any) -> Callable[[Path], Any]:
    """Replace the file of one process by that of another model."""

    def replace(folder: Path) -> None:
        kept = (folder / name(1 - rank)).read_bytes()
        save_shards(folder, tensors, **how)
        (folder / name(1 - rank)).write_bytes(kept)

    return replace


def shard_twice(folder: Path) -> None:
    (folder / name(0)).unlink(), (folder / name(1)).unlink()
    save_shards(folder, {"rows": torch.randn(4, 4)}, (2, 2), [Shard(0), Shard(1)])


@pytest.mark.parametrize(
    ("break_it", "kind", "named"),
    [
        (lambda at: (at / name(0)).unlink(), "checkpoint-incomplete", name(0)),
        (lambda at: save_shards(at, WHOLE, (3,)), "checkpoint-damaged", "2 and of 3"),
        (lambda at: shutil.copy(at / name(0), at / name(1)), "checkpoint-damaged", "'bias'"),
        (with_another(1, WHOLE | {"rows": torch.randn(5, 4)}), "checkpoint-damaged", "'rows'"),
        (with_another(0, whole={"new": torch.ones(2)}), "checkpoint-damaged", "'new'"),
        (lambda at: os.truncate(at / name(1), (at / name(1)).stat().st_size - 200), "checkpoint-damaged", name(1)),
        (lambda at: torch.save({"rows": Hostile(at / "ran")}, at / name(1)), "checkpoint-damaged", name(1)),
        (
            lambda at: save_shards(at, {"rows": torch.randn(4, 4)}, (2,), [Partial()]),
            "checkpoint-unsupported-model",
            "Partial",
        ),
        (shard_twice, "checkpoint-unsupported-model", "verl.model_merger"),
    ],
)
def test_parts_of_models_are_refused(tmp_path: Path, break_it: Callable[[Path], Any], kind: str, named: str) -> None:
    break_it(save_shards(tmp_path, WHOLE))
    with raises_kind(kind, named):
        open_shards(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("placement", [Replicate(), None])
def test_copies_that_differ_are_refused(tmp_path: Path, placement: Any) -> None:
    how: dict[str, Any] = {"whole": {"b": torch.zeros(2)}} if placement is None else {"placements": [placement]}
    other = save_shards(tmp_path / "other", {"a": torch.ones(4, 2)}, **{**how, "whole": {"b": torch.ones(2)}})
    folder = save_shards(tmp_path / "one", {"a": torch.zeros(4, 2)}, **how)
    shutil.copy(other / name(1), folder / name(1))
    torch.save({**torch.load(folder / name(0), weights_only=True), "b": torch.zeros(2)}, folder / name(0))
    file = open_shards(folder, allow_pickle=True)
    with raises_kind("checkpoint-damaged", "'b'" if placement is None else "'a'"):
        file.read("b" if placement is None else "a")


def test_an_adapter_is_read_from_the_state_of_its_model(tmp_path: Path) -> None:
    for step in STEPS:
        verl(tmp_path, step, lora_state(step), lora=True)
    with raises_kind("checkpoint-pickle", name(0), "--allow-pickle"):
        open_checkpoints(tmp_path)
    source = open_checkpoints(tmp_path, allow_pickle=True)
    assert (source.name, source.naming, source.steps) == ("peft-adapter", "global_step_N/actor/huggingface", STEPS)
    assert [p.name for p in source.parameters] == [f"{MODULE}.weight"]
    assert source.skipped == {}  # the base model is no part of the adapter
    assert torch.equal(dense(source.delta(f"{MODULE}.weight", 20, 10)), torch.full((3, 4), 40.0, dtype=torch.float64))


def test_a_whole_model_is_read_under_the_trainers_names_of_the_folder(tmp_path: Path) -> None:
    for role in ("actor", "policy"):  # verl; SkyRL
        root = tmp_path / role
        for step in (0, *STEPS):
            actor = verl(root, step, {"w": torch.full((5, 4), float(step)), "norm": torch.ones(3)})
            actor.rename(actor.with_name(role))
        source = open_checkpoints(root, allow_pickle=True)
        assert (source.name, source.steps, list(source.skipped)) == ("full-model", STEPS, ["norm"])
        assert torch.equal(source.delta("w", 20, None), torch.full((5, 4), 20.0))
        assert source.precision("w") == torch.float32


def test_the_state_of_a_model_with_an_adapter_in_huggingface_is_that_adapter(tmp_path: Path) -> None:
    for step in STEPS:
        actor = verl(tmp_path, step, {"other": torch.ones(2, 2)}, lora=True)
        save_file(lora_state(step), actor / "huggingface" / "model.safetensors")
    source = open_checkpoints(tmp_path)  # no pickle is read
    assert source.name == "peft-adapter"
    assert torch.equal(dense(source.delta(f"{MODULE}.weight", 20, 10)), torch.full((3, 4), 40.0, dtype=torch.float64))


def test_such_a_state_without_rank_and_alpha_is_refused(tmp_path: Path) -> None:
    for step in STEPS:
        actor = verl(tmp_path, step, lora_state(step))
        save_file(lora_state(step), actor / "huggingface" / "model.safetensors")
    with raises_kind("checkpoint-unsupported-adapter", "base_model.model.", "lora_train_meta.json"):
        open_checkpoints(tmp_path)


def test_an_exported_adapter_or_model_comes_before_the_shards(tmp_path: Path) -> None:
    for step in STEPS:
        adapter(verl(tmp_path / "a", step, lora_state(step), lora=True) / "lora_adapter", step)
        actor = verl(tmp_path / "m", step, {"w": torch.ones(2, 2)})
        save_file({"w": torch.full((2, 2), float(step))}, actor / "huggingface" / "model.safetensors")
    assert open_checkpoints(tmp_path / "a").naming == "global_step_N/actor/lora_adapter"
    assert torch.equal(open_checkpoints(tmp_path / "m").delta("w", 20, 10), torch.full((2, 2), 10.0))


@pytest.mark.parametrize("tracker", ["latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt"])
def test_a_step_that_the_trainer_did_not_complete_is_refused_or_skipped(tmp_path: Path, tracker: str) -> None:
    for step in (*STEPS, 30):
        verl(tmp_path, step, {"w": torch.ones(2, 2)})
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    (tmp_path / tracker).write_text("20")
    with raises_kind("checkpoint-incomplete", "global_step_30", tracker):
        open_checkpoints(tmp_path, allow_pickle=True)
    assert open_checkpoints(tmp_path, allow_pickle=True, skip_damaged=True).steps == STEPS
    (tmp_path / tracker).write_text("")
    with raises_kind("checkpoint-damaged", tracker):
        open_checkpoints(tmp_path, allow_pickle=True)


def test_replaced_shards_are_seen(tmp_path: Path) -> None:
    files = ModelFiles(save_shards(tmp_path, WHOLE), allow_pickle=True)
    assert files.unchanged()
    assert [path.name for path in files.weight_files()] == [name(0), name(1)]
    shutil.copy(tmp_path / name(1), tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / name(1))
    assert not files.unchanged()

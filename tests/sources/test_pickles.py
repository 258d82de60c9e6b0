"""Weights in ``.bin`` files: refused by default; where they are allowed, only tensors are read from them."""

import json
from pathlib import Path

import pytest
import torch

from next_core import open_checkpoints
from next_core.mathematics.low_rank import dense
from next_core.sources.tensor_files import PickleFile
from tests.errors import raises_kind
from tests.sources.models import MODULE, Hostile, adapter, adapter_tensors


def run(root: Path) -> Path:
    for step in (10, 20):
        adapter(root / f"global_step{step}_hf", step, pickled=True)
        (root / f"global_step{step}_hf" / "tokenizer_config.json").write_text("{}")
    return root


def test_an_adapter_in_a_pickle_is_read_only_if_that_is_allowed(tmp_path: Path) -> None:
    run(tmp_path)
    with raises_kind("checkpoint-pickle", "global_step10_hf/adapter_model.bin", "allow_pickle=True", "--allow-pickle"):
        open_checkpoints(tmp_path)
    source = open_checkpoints(tmp_path, allow_pickle=True)
    assert source.steps == (10, 20)
    assert torch.equal(dense(source.delta(f"{MODULE}.weight", 20, 10)), torch.full((3, 4), 20.0, dtype=torch.float64))


@pytest.mark.parametrize("shards", [1, 2])
def test_models_in_pickles_are_read_only_if_that_is_allowed(tmp_path: Path, shards: int) -> None:
    for step in (0, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        tensors = {"a": torch.full((3, 2), float(step)).bfloat16(), "b": torch.zeros(4)}
        if shards == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            for key, value in tensors.items():
                torch.save({key: value}, folder / f"{key}.bin")
            index = {"weight_map": {key: f"{key}.bin" for key in tensors}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with raises_kind("checkpoint-pickle", "checkpoint-0"):
        open_checkpoints(tmp_path)
    source = open_checkpoints(tmp_path, allow_pickle=True)
    assert source.precision("a") == torch.bfloat16
    assert torch.equal(dense(source.delta("a", 20, 10)), torch.full((3, 2), 10.0).double())
    assert torch.equal(source.delta_rows("a", slice(1, 2), 20), torch.full((1, 2), 20.0).double())


def test_a_model_in_a_pickle_can_be_a_backbone_if_that_is_allowed(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "base").mkdir()
    torch.save({f"{MODULE}.weight": torch.zeros(3, 4)}, tmp_path / "base" / "pytorch_model.bin")
    assert open_checkpoints(tmp_path / "run", tmp_path / "base", allow_pickle=True).steps == (10, 20)


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "checkpoint-10", 10)
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    assert open_checkpoints(tmp_path).steps == (10,)


def test_a_hostile_pickle_runs_nothing_even_if_pickles_are_allowed(tmp_path: Path) -> None:
    run(tmp_path / "run")
    weights, touched = tmp_path / "run" / "global_step20_hf" / "adapter_model.bin", tmp_path / "touched"
    torch.save(adapter_tensors(20) | {"x": Hostile(touched)}, weights)
    with raises_kind("checkpoint-damaged", weights):
        open_checkpoints(tmp_path / "run", allow_pickle=True)
    assert not touched.exists()
    torch.load(weights, weights_only=False)  # the bait works
    assert touched.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.zeros(2)], "list"),
        ({"a": {"b": torch.zeros(2)}}, "'a'"),
        ({"a": 3}, "'a'"),
        ({1: torch.zeros(2)}, "1"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "'a'"),
        ({"a": torch.eye(2).to_sparse()}, "'a'"),
    ],
)
def test_anything_but_a_dict_of_plain_tensors_is_refused(tmp_path: Path, content: object, named: str) -> None:
    torch.save(content, tmp_path / "x.bin")
    with raises_kind("checkpoint-damaged", tmp_path / "x.bin", named):
        PickleFile(tmp_path / "x.bin")


def test_a_tensor_of_a_pickle_that_is_unknown_or_not_finite_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "x.bin")
    with raises_kind("checkpoint-not-finite", tmp_path / "x.bin", "'a'"):
        PickleFile(tmp_path / "x.bin").read("a")
    with raises_kind("checkpoint-not-found", tmp_path / "x.bin", "'b'"):
        PickleFile(tmp_path / "x.bin").read("b")

"""Full-parameter checkpoints, in one file or in shards: dense deltas, read one matrix at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import History, open_checkpoints
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.sources.full_model import FullModelSource
from tests.conftest import noise

WEIGHTS = {"a.weight": (6, 5), "b.weight": (4, 4), "norm.weight": (5,)}
INDEX = "model.safetensors.index.json"


def weights(step: int) -> dict[str, Tensor]:
    return {name: noise(name, *shape) + step * 0.01 * noise(f"{name}d", *shape) for name, shape in WEIGHTS.items()}


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder


@pytest.fixture(params=[1, 2], ids=["one file", "shards"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints" / f"checkpoint-{step}", weights(step), request.param)
    save(tmp_path / "base", weights(0), request.param)
    return tmp_path


def opened(run: Path) -> FullModelSource:
    source = open_checkpoints(run / "checkpoints", backbone=run / "base")
    assert isinstance(source, FullModelSource)
    return source


def refusal(run: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(run)
    return str(caught.value)


def dense(source: CheckpointSource, name: str, step: int, since: int | None = None) -> Tensor:
    delta = source.delta(name, step, since)
    assert isinstance(delta, Tensor)
    return delta


def test_matrices_have_dense_deltas_and_the_rest_is_skipped_with_the_reason(run: Path) -> None:
    source = opened(run)
    assert source.name == "full-model"
    assert source.steps == (10, 20, 30)
    assert [(p.name, p.shape, p.kind) for p in source.parameters] == [
        ("a.weight", (6, 5), "dense"),
        ("b.weight", (4, 4), "dense"),
    ]
    assert source.skipped == {"norm.weight": "not a matrix; stays as trained"}
    for name in ("a.weight", "b.weight"):
        for step, since in ((10, None), (30, None), (30, 10), (20, 30)):
            expected = (weights(step)[name].double() - weights(since or 0)[name].double()).float()
            assert torch.equal(dense(source, name, step, since), expected)
            assert source.factors(name, step) is None


def test_without_a_backbone_step_0_is_it(run: Path) -> None:
    shutil.copytree(run / "base", run / "checkpoints" / "checkpoint-0")
    source = open_checkpoints(run / "checkpoints")
    assert source.steps == (10, 20, 30)
    expected = weights(30)["a.weight"] - weights(0)["a.weight"]
    assert torch.equal(dense(source, "a.weight", 30), expected)


def test_without_any_backbone_a_global_delta_is_refused_with_the_remedy(run: Path) -> None:
    source = open_checkpoints(run / "checkpoints")
    assert torch.isfinite(dense(source, "a.weight", 30, 10)).all()
    with pytest.raises(CheckpointError, match=r"checkpoints has no backbone; pass --backbone"):
        source.delta("a.weight", 30)
    with pytest.raises(CheckpointError, match=r"has no step 15; observed steps: \(10, 20, 30\)"):
        source.delta("a.weight", 15, 10)


def test_a_parameter_that_is_not_there_is_named(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no parameter 'c\.weight'"):
        opened(run).delta("c.weight", 30)


def test_checkpoints_of_unlike_shapes_or_names_are_named(run: Path) -> None:
    folder = run / "checkpoints" / "checkpoint-20"
    renamed = {("z.weight" if name == "a.weight" else name): value for name, value in weights(20).items()}
    for stored, words in (
        (weights(20) | {"a.weight": torch.zeros(6, 6)}, "'a.weight' is (6, 6) but (6, 5) in step 10"),
        (
            weights(20) | {"other.weight": torch.zeros(2, 2)},
            "'other.weight' is new, step 10 does not have it (1 in all)",
        ),
        ({"a.weight": torch.zeros(6, 5)}, "'b.weight' is missing, which step 10 has (2 in all)"),
        (renamed, "'a.weight' of step 10 is missing and 'z.weight' is new (of 1 missing, 1 new); did training rename"),
    ):
        shutil.rmtree(folder)
        save(folder, stored)
        message = refusal(run)
        assert "checkpoint-20: " in message
        assert words in message


def test_a_backbone_of_another_model_is_named_with_the_parameter(run: Path) -> None:
    shutil.rmtree(run / "base")
    save(run / "base", {"a.weight": torch.zeros(6, 5)})
    assert "has no 'b.weight'; it is not the model of this run" in refusal(run)
    shutil.rmtree(run / "base")
    save(run / "base", weights(0) | {"b.weight": torch.zeros(4, 5)})
    assert "'b.weight' is (4, 5) but the run has (4, 4)" in refusal(run)


def test_a_backbone_may_hold_more_than_the_run(run: Path) -> None:
    shutil.rmtree(run / "base")
    save(run / "base", weights(0) | {"extra.weight": torch.zeros(3, 3)})
    assert opened(run).steps == (10, 20, 30)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / "checkpoints" / "checkpoint-10", weights(10), 2)
    save(tmp_path / "base", weights(0), 2)
    return tmp_path


@pytest.mark.parametrize("outside", ["../../../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "."])
def test_an_index_that_points_outside_its_folder_is_refused(sharded: Path, outside: str) -> None:
    index = sharded / "checkpoints" / "checkpoint-10" / INDEX
    index.write_text(json.dumps({"weight_map": {"a.weight": outside}}))
    message = refusal(sharded)
    assert f"{INDEX} points outside its folder: {outside!r}" in message


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1, "b": []}}']
)
def test_an_index_that_maps_nothing_is_named(sharded: Path, content: str) -> None:
    (sharded / "checkpoints" / "checkpoint-10" / INDEX).write_text(content)
    assert f"checkpoint-10/{INDEX}" in refusal(sharded)


def test_a_shard_that_is_missing_or_truncated_or_lacks_a_tensor_is_named(sharded: Path) -> None:
    shard = sharded / "checkpoints" / "checkpoint-10" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    save_file({"unrelated": torch.zeros(1)}, shard)
    assert "model-00002-of-00002.safetensors has no 'b.weight', which the index says it has" in refusal(sharded)
    save_file(tensors, shard)
    opened(sharded)
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "checkpoint-10/model-00002-of-00002.safetensors is truncated" in refusal(sharded)
    shard.unlink()
    assert "checkpoint-10/model-00002-of-00002.safetensors is missing" in refusal(sharded)


def test_a_value_that_is_not_finite_is_named_by_file_and_tensor(run: Path) -> None:
    folder = run / "checkpoints" / "checkpoint-20"
    shutil.rmtree(folder)
    save(folder, weights(20) | {"a.weight": torch.full((6, 5), float("nan"))})
    with pytest.raises(CheckpointError, match=r"checkpoint-20/model\.safetensors: 'a\.weight' holds NaN or Inf"):
        History(opened(run)).grams()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_subtracted_in_full(run: Path, dtype: torch.dtype) -> None:
    shutil.rmtree(run / "checkpoints" / "checkpoint-20")
    small = {name: weight.to(dtype) for name, weight in weights(20).items()}
    save(run / "checkpoints" / "checkpoint-20", small)
    found = dense(opened(run), "a.weight", 20)
    assert torch.equal(found, (small["a.weight"].double() - weights(0)["a.weight"].double()).float())


def test_a_jump_moves_the_checkpoints_up_to_its_step_and_the_backbone(run: Path) -> None:
    folder = run / "jumps" / "0001"
    folder.mkdir(parents=True)
    (folder / "jump.json").write_text(json.dumps({"step": 20, "alpha": 1.0, "adapter": None}))
    shift = noise("shift", 6, 5)
    save_file({"a.weight": shift}, folder / "shift.safetensors")
    source = opened(run)
    plain, moved = {step: weights(step)["a.weight"] for step in (0, 20, 30)}, shift
    torch.testing.assert_close(dense(source, "a.weight", 30, 20), plain[30] - plain[20] - moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(dense(source, "a.weight", 30), plain[30] - plain[0] - moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(dense(source, "a.weight", 20), plain[20] - plain[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(source.position("a.weight", 30).float(), plain[30] - plain[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(source.position("a.weight", 20).float(), plain[20] - plain[0] + moved, atol=1e-6, rtol=0)


def test_some_rows_of_a_delta_are_those_of_the_whole_jumps_included(run: Path) -> None:
    name = opened(run).parameters[0].name
    m, n = opened(run).parameters[0].shape
    folder = run / "jumps" / "0001"
    folder.mkdir(parents=True)
    (folder / "jump.json").write_text(json.dumps({"step": 10, "alpha": 1.0, "adapter": None}))
    save_file({name: torch.randn(m, n)}, folder / "shift.safetensors")
    source = opened(run)
    for since in (None, 10):
        whole = dense(source, name, 30, since)
        for rows in (slice(0, 1), slice(1, m), slice(0, m)):
            assert torch.equal(source.delta_rows(name, rows, 30, since), whole[rows])


def test_what_is_neither_adapter_nor_model_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "training_args.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds no checkpoints of a known layout"):
        open_checkpoints(tmp_path)


def test_step_0_beside_a_backbone_is_where_rl_began_and_the_backbone_what_is_on_disk(run: Path) -> None:
    begun = {name: value + noise("before RL", *value.shape) for name, value in weights(0).items()}
    save(run / "checkpoints" / "checkpoint-0", begun)
    source = opened(run)
    assert source.steps == (10, 20, 30)
    name = "a.weight"
    expected = weights(30)[name] - begun[name]
    assert torch.equal(dense(source, name, 30), expected)
    assert torch.equal(source.delta_rows(name, slice(1, 3), 30), expected[1:3])
    assert torch.equal(source.position(name, 30), weights(30)[name].double() - weights(0)[name])

"""Full-parameter checkpoints, in one file or in shards: dense deltas, read one matrix at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core import open_checkpoints
from next_core.sources.folder_source import check_same_shapes
from next_core.sources.full_model import FullModelSource
from tests.conftest import noise
from tests.errors import raises_kind
from tests.sources.models import write_jump

WEIGHTS = {"a.weight": (6, 5), "b.weight": (4, 4), "norm.weight": (5,)}
INDEX = "model.safetensors.index.json"


def weights(step: int) -> dict[str, Tensor]:
    return {name: noise(name, *shape) + step * 0.01 * noise(f"{name}d", *shape) for name, shape in WEIGHTS.items()}


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
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
    return open_checkpoints(run / "checkpoints", backbone=run / "base")


def test_matrices_have_dense_deltas_and_the_rest_is_skipped_with_the_reason(run: Path) -> None:
    source = opened(run)
    assert (source.name, source.steps) == ("full-model", (10, 20, 30))
    assert [(p.name, p.shape, p.kind) for p in source.parameters] == [
        ("a.weight", (6, 5), "dense"),
        ("b.weight", (4, 4), "dense"),
    ]
    assert source.skipped == {"norm.weight": "not a matrix; stays as trained"}
    for name in ("a.weight", "b.weight"):
        for step, since in ((10, None), (30, None), (30, 10), (20, 30)):
            expected = (weights(step)[name].double() - weights(since or 0)[name].double()).float()
            assert torch.equal(source.delta(name, step, since), expected)
            assert source.factors(name, step) is None


def test_without_a_backbone_step_0_replaces_it(run: Path) -> None:
    source = open_checkpoints(run / "checkpoints")
    assert torch.isfinite(source.delta("a.weight", 30, 10)).all()
    with raises_kind("config-missing-backbone", run / "checkpoints"):
        source.delta("a.weight", 30)
    with raises_kind("checkpoint-not-found", "step 15", "(10, 20, 30)"):
        source.delta("a.weight", 15, 10)
    shutil.copytree(run / "base", run / "checkpoints" / "checkpoint-0")
    source = open_checkpoints(run / "checkpoints")
    assert source.steps == (10, 20, 30)
    assert torch.equal(source.delta("a.weight", 30), weights(30)["a.weight"] - weights(0)["a.weight"])


@pytest.mark.parametrize(
    ("stored", "figures"),
    [
        (weights(20) | {"a.weight": torch.zeros(6, 6)}, ("'a.weight'", "(6, 6)", "(6, 5)")),
        (weights(20) | {"other.weight": torch.zeros(2, 2)}, ("'other.weight' is new",)),
        ({"a.weight": torch.zeros(6, 5)}, ("'b.weight' is missing",)),
        (
            {name.replace("a.", "z."): value for name, value in weights(20).items()},
            ("'a.weight' of step 10 is missing", "'z.weight' is new"),
        ),
    ],
)
def test_a_step_of_another_model_is_named(tmp_path: Path, stored: dict[str, Tensor], figures: tuple[str, ...]) -> None:
    save(tmp_path / "checkpoint-10", weights(10))
    save(tmp_path / "checkpoint-20", stored)
    with raises_kind("checkpoint-other-model", "checkpoint-20: ", "step 10", *figures):
        open_checkpoints(tmp_path)


def test_a_backbone_must_have_every_parameter_of_the_run_and_may_have_more(run: Path) -> None:
    save(run / "base", {"a.weight": torch.zeros(6, 5)})
    with raises_kind("checkpoint-other-model", run / "base", "'b.weight'"):
        opened(run)
    save(run / "base", weights(0) | {"b.weight": torch.zeros(4, 5)})
    with raises_kind("checkpoint-other-model", "'b.weight'", "(4, 5)", "(4, 4)"):
        opened(run)
    save(run / "base", weights(0) | {"extra.weight": torch.zeros(3, 3)})
    assert opened(run).steps == (10, 20, 30)


def test_a_renamed_parameter_is_named_with_the_likeliest_new_name_of_its_shape() -> None:
    ours = {"layers.0.q": (2, 2), "layers.0.up": (4, 2), "norm": (2,)}
    theirs = {"norm": (2,), "layers.0.qq": (3, 3), "zzz": (2, 2), "model.layers.0.q": (2, 2), "model.up": (4, 2)}
    with raises_kind(
        "checkpoint-other-model", "'layers.0.q' of step 10", "'model.layers.0.q' is new", "2 missing, 4 new"
    ):
        check_same_shapes(ours, theirs, Path("checkpoint-20"), "step 10")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1, "b": []}}']
)
def test_an_index_without_a_map_is_named(tmp_path: Path, content: str) -> None:
    (save(tmp_path / "checkpoint-10", weights(10), 2) / INDEX).write_text(content)
    with raises_kind("checkpoint-damaged", f"checkpoint-10/{INDEX}"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_subtracted_in_fp32(run: Path, dtype: torch.dtype) -> None:
    small = {name: weight.to(dtype) for name, weight in weights(20).items()}
    save(run / "checkpoints" / "checkpoint-20", small)
    delta = opened(run).delta("a.weight", 20)
    assert torch.equal(delta, (small["a.weight"].double() - weights(0)["a.weight"].double()).float())


def test_a_jump_moves_the_checkpoints_up_to_its_step_and_the_backbone(run: Path) -> None:
    moved = noise("shift", 6, 5)
    write_jump(run, 20, {"a.weight": moved})
    source = opened(run)
    plain = {step: weights(step)["a.weight"] for step in (0, 20, 30)}
    torch.testing.assert_close(source.delta("a.weight", 30, 20), plain[30] - plain[20] - moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(source.delta("a.weight", 30), plain[30] - plain[0] - moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(source.delta("a.weight", 20), plain[20] - plain[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(source.position("a.weight", 30).float(), plain[30] - plain[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(source.position("a.weight", 20).float(), plain[20] - plain[0] + moved, atol=1e-6, rtol=0)


def test_some_rows_of_a_delta_are_those_of_the_whole_with_jumps(run: Path) -> None:
    write_jump(run, 10, {"a.weight": torch.randn(6, 5)})
    source = opened(run)
    for since in (None, 10):
        whole = source.delta("a.weight", 30, since)
        for rows in (slice(0, 1), slice(1, 6), slice(0, 6)):
            assert torch.equal(source.delta_rows("a.weight", rows, 30, since), whole[rows])


def test_with_step_0_and_a_backbone_rl_began_at_the_former_and_positions_count_from_the_latter(run: Path) -> None:
    began = {name: value + noise("before RL", *value.shape) for name, value in weights(0).items()}
    save(run / "checkpoints" / "checkpoint-0", began)
    source = opened(run)
    assert source.steps == (10, 20, 30)
    name = "a.weight"
    expected = weights(30)[name] - began[name]
    assert torch.equal(source.delta(name, 30), expected)
    assert torch.equal(source.delta_rows(name, slice(1, 3), 30), expected[1:3])
    assert torch.equal(source.position(name, 30), weights(30)[name].double() - weights(0)[name])


def test_a_jump_is_added_once_however_often_a_stack_is_read(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "checkpoint-20", {"experts": torch.ones(2, 3, 3)})
    write_jump(tmp_path, 20, {"experts[0]": torch.ones(3, 3)})
    source = FullModelSource(FullModelSource.config_class(path=tmp_path / "checkpoints"))
    assert [float(source.stored("experts", 20)[0, 0, 0]) for _ in range(3)] == [2.0] * 3
    assert torch.equal(source.weight("experts[0]", 20), 2 * torch.ones(3, 3))

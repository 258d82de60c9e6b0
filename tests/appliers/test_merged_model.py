"""A written model loads as any Hugging Face model, and is the backbone plus what was trained plus the jump."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core import make_applier, make_predictor, open_checkpoints
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.mathematics.low_rank import LowRank
from next_core.storage.manifest import check_manifest
from tests.appliers.conftest import ROW, secant
from tests.conftest import LoraRun, MakeRun, noise
from tests.errors import raises_kind
from tests.sources.models import built, edit_json, straight_run, write_jump

MODEL = "model.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def sharded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base in several shards."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).double()


def changed_base(base: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """A copy of a model with other tensors and fields of its config."""
    shutil.copytree(base, to)
    save_file(change(load_file(base / MODEL)), to / MODEL, metadata={"format": "pt"})
    edit_json(to / "config.json", **config)
    return to


def bfloat16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.bfloat16() for key, value in tensors.items()}


def with_low_rank(run: LoraRun, backbone: Path) -> Prediction:
    return secant(run, backbone, updates={ROW: LowRankUpdate(LowRank(noise("l", 16, 1), noise("r", 1, 16)))})


def moves(run: LoraRun) -> dict[str, Tensor]:
    """The jump of ``with_low_rank``."""
    jump = {name: run.deltas[20][name] - run.deltas[10][name] for name in run.deltas[20]}
    return jump | {ROW: noise("l", 16, 1).double() @ noise("r", 1, 16).double()}


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_it_loads_with_the_right_logits(
    run: LoraRun, sharded: Path, layout: str, tmp_path: Path, logits: Callable[[Any], Tensor]
) -> None:
    backbone = run.base if layout == "one file" else sharded
    before = {path.name: path.read_bytes() for path in backbone.iterdir()}
    applied = make_applier("merged-model").apply(with_low_rank(run, backbone), alpha=1.5, out=tmp_path / "out")
    expected = load(run.base)
    with torch.no_grad():
        for name, jump in moves(run).items():
            expected.get_parameter(name).add_(run.deltas[20][name] + 1.5 * jump)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(expected), atol=1e-5, rtol=1e-5)
    assert applied.share == pytest.approx(1.0, abs=1e-5)
    assert set(applied.shares) == set(run.deltas[20])
    check_manifest(tmp_path / "out", contents=True)
    assert {path.name: path.read_bytes() for path in backbone.iterdir()} == before
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*before, "manifest.json", "extrapolation.json", "README.md"}


def test_the_backbone_can_be_named_by_the_applier_and_is_not_written_into(run: LoraRun, tmp_path: Path) -> None:
    prediction = Prediction(open_checkpoints(run.path), 20, 10)
    with raises_kind("config-missing-backbone", "--backbone"):
        make_applier("merged-model").apply(prediction, out=tmp_path / "out")
    with raises_kind("config-contradiction", run.base):
        make_applier("merged-model", backbone=run.base).apply(prediction, out=run.base / "new")
    make_applier("merged-model", backbone=run.base).apply(prediction, out=tmp_path / "out")
    trained = load_file(run.base / MODEL)[ROW] + run.deltas[20][ROW].float()
    torch.testing.assert_close(load_file(tmp_path / "out" / MODEL)[ROW], trained, atol=1e-6, rtol=1e-5)


def test_the_backbones_precision_is_kept_and_values_beyond_it_are_refused(run: LoraRun, tmp_path: Path) -> None:
    half = changed_base(run.base, tmp_path / "half", lambda tensors: {k: v.half() for k, v in tensors.items()})
    make_applier("merged-model").apply(secant(run, half), out=tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / MODEL).values()} == {torch.float16}
    large = LowRankUpdate(LowRank(torch.full((16, 1), 1e5), torch.ones(1, 16)))
    with raises_kind("numbers-overflow", ROW, "float16"):
        make_applier("merged-model").apply(secant(run, half, updates={ROW: large}), out=tmp_path / "large")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda tensors: {"x": torch.zeros(2, 2)}, "checkpoint-other-model", ".weight"),
        (lambda tensors: tensors | {ROW: torch.zeros(16, 4)}, "checkpoint-other-model", ROW),
        (lambda tensors: tensors | {ROW: tensors[ROW].to(torch.int8)}, "checkpoint-unsupported-model", ROW),
    ],
    ids=["another model", "another shape", "quantised"],
)
def test_a_backbone_that_does_not_fit_is_refused(
    run: LoraRun, tmp_path: Path, change: Any, kind: str, named: str
) -> None:
    other = changed_base(run.base, tmp_path / "other", change)
    prediction = Prediction(open_checkpoints(run.path), 20, 10)
    with raises_kind(kind, named, other):
        make_applier("merged-model", backbone=other).apply(prediction, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_with_an_adapter_is_merged_although_peft_saves_it_whole(make_lora_run: MakeRun, tmp_path: Path) -> None:
    run = make_lora_run(tmp_path / "run", (10, 20), target_modules=["q_proj", "lm_head"])
    assert any("base_layer" in key for key in load_file(run.folder(20) / "adapter_model.safetensors"))
    make_applier("merged-model").apply(Prediction(open_checkpoints(run.path, run.base), 20, 10), out=tmp_path / "out")
    expected = load_file(run.base / MODEL)[HEAD] + run.deltas[20][HEAD]
    torch.testing.assert_close(load_file(tmp_path / "out" / MODEL)[HEAD], expected.float())


@pytest.fixture
def full_run(tmp_path: Path, base: Path) -> dict[int, dict[str, Tensor]]:
    """A full-parameter run in ``tmp_path/checkpoints``, whose norms train too."""
    start = load_file(base / MODEL)
    weights = {0: start}
    for step in (10, 20):
        weights[step] = {key: value + 0.001 * step * noise(f"{key}", *value.shape) for key, value in start.items()}
        changed_base(base, tmp_path / "checkpoints" / f"checkpoint-{step}", lambda _, step=step: weights[step])
    return weights


def test_a_jump_in_the_newest_checkpoint_is_added_once(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path
) -> None:
    write_jump(tmp_path, 10, {ROW: noise("jump", 16, 16)})
    source = open_checkpoints(tmp_path / "checkpoints")
    make_applier("merged-model", backbone=base).apply(Prediction(source, 20, 10), out=tmp_path / "out")
    written = load_file(tmp_path / "out" / MODEL)
    assert all(torch.equal(value, full_run[20][key]) for key, value in written.items())


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4, 5)])
def test_a_trained_tensor_that_the_backbone_does_not_store_is_refused(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path, shape: tuple[int, ...]
) -> None:
    name = "model.layers.0.mlp.more"
    for step in (10, 20):
        path = tmp_path / "checkpoints" / f"checkpoint-{step}" / MODEL
        save_file(full_run[step] | {name: noise(name, *shape)}, path, metadata={"format": "pt"})
    source = open_checkpoints(tmp_path / "checkpoints", backbone=base)
    with raises_kind("checkpoint-other-model", name, base):
        make_applier("merged-model").check_source(source, tmp_path / "out")


@pytest.mark.parametrize(("step", "moves"), [(10, True), (20, True), (20, False)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_damaged_value_is_named_with_its_checkpoint_and_not_called_an_overflow(
    full_run: dict[int, dict[str, Tensor]], tmp_path: Path, base: Path, step: int, moves: bool, value: float
) -> None:
    damaged = full_run[step][ROW].clone()
    damaged[3, 5] = value
    path = tmp_path / "checkpoints" / f"checkpoint-{step}" / MODEL
    save_file(full_run[step] | {ROW: damaged}, path, metadata={"format": "pt"})
    source = open_checkpoints(tmp_path / "checkpoints", backbone=base)
    updates = {ROW: CoefficientUpdate({20: 1.0, 10: -1.0})} if moves else {}
    with raises_kind("checkpoint-not-finite", f"checkpoint-{step}", ROW):
        make_applier("merged-model").apply(Prediction(source, 20, 10, updates=updates), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_reported_shares_are_those_of_the_files(run: LoraRun, tmp_path: Path, rounding: str) -> None:
    half = changed_base(run.base, tmp_path / "half", bfloat16)
    applied = make_applier("merged-model", rounding=rounding).apply(
        with_low_rank(run, half), alpha=0.05, out=tmp_path / "out"
    )
    backbone, written = load_file(half / MODEL), load_file(tmp_path / "out" / MODEL)
    along = wanted = changed = 0.0
    for name, move in moves(run).items():
        trained, jump = run.deltas[20][name], 0.05 * move
        start = (backbone[name].double() + trained).float().bfloat16().double()
        share = ((written[name].double() - start) * jump).sum() / (jump * jump).sum()
        assert applied.shares[name] == pytest.approx(float(share), rel=1e-3, abs=1e-3)
        along += float(((written[name].double() - backbone[name].double()) * (trained + jump)).sum())
        wanted += float(((trained + jump) ** 2).sum())
        changed += float((written[name].double() != start).sum())
    record = json.loads((tmp_path / "out" / "extrapolation.json").read_text())
    assert record["share_of_jump"] == pytest.approx(applied.share)
    assert record["share_of_update"] == pytest.approx(along / wanted, rel=1e-3)
    assert next(iter(record["lowest_shares_of_jump"].items())) == min(applied.shares.items(), key=lambda item: item[1])
    assert (record["step"], record["horizon"], record["alpha"], record["rounding"]) == (20, 10, 0.05, rounding)
    assert record["elements_changed"] == pytest.approx(changed, rel=0.01)


def test_stochastic_rounding_repeats_with_its_seed(run: LoraRun, tmp_path: Path) -> None:
    half = changed_base(run.base, tmp_path / "half", bfloat16)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_applier("merged-model", rounding="stochastic", seed=seed).apply(secant(run, half), out=tmp_path / name)
    a, b, c = ((tmp_path / name / MODEL).read_bytes() for name in "abc")
    assert a == b != c
    with raises_kind("config-contradiction", "rounding: stochastic"):
        make_applier("merged-model", seed=3)


def test_every_name_of_a_shared_tensor_gets_the_same_values(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    shared = built("T5ForConditionalGeneration", "T5Config", vocab_size=32, **sizes)
    run = straight_run(tmp_path, shared)
    stored = load_file(run.base / MODEL)
    names = {name: one for name, one in shared.all_tied_weights_keys.items() if one in stored}
    save_file(stored | {name: stored[one].clone() for name, one in names.items()}, run.base / MODEL, {"format": "pt"})
    source = open_checkpoints(run.path, backbone=run.base)
    prediction = make_predictor("secant", window=10).fit(History(source)).predict(10)
    make_applier("merged-model").apply(prediction, out=tmp_path / "out")
    written = load_file(tmp_path / "out" / MODEL)
    assert written.keys() == stored.keys() | names.keys() > stored.keys()
    for name, one in names.items():
        assert torch.equal(written[name], written[one])
        torch.testing.assert_close(written[name], run.at(30)[one], atol=1e-5, rtol=0)

"""A jump written in verl's own layout. That verl loads it is shown by ``make test-verl``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from next_core import History, make_applier, make_predictor, open_checkpoints
from next_core.appliers.folder_applier import apply_sweep
from next_core.interfaces import CheckpointSource, Prediction
from next_core.sources.fsdp_shards import open_shards
from next_core.storage import atomic
from next_core.storage.manifest import check_manifest
from tests.conftest import Cli
from tests.errors import raises_kind
from tests.sources.fsdp import lora_state, verl
from tests.sources.models import model

STEPS = (10, 20, 30)
OPTIMIZER = b"Adam's moments"


def whole(step: int) -> dict[str, Tensor]:
    """Weights that move by 10 in 10 steps; the vector is no matrix and stays as trained."""
    began = torch.arange(20.0).view(5, 4)
    return {"rows": began + step, "stack": torch.ones(3, 4, 2) * step, "norm": torch.full((7,), float(step))}


def run(root: Path, lora: bool = False, **how: Any) -> CheckpointSource:
    for step in (0, *STEPS):
        actor = verl(root, step, lora_state(step) if lora else whole(step), lora=lora, **how)
        (actor / "optim_world_size_2_rank_0.pt").write_bytes(OPTIMIZER)
        (actor.parent / "data.pt").write_bytes(b"where the data are")
        (actor.parent / "critic").mkdir()
        (actor.parent / "critic" / "model_world_size_2_rank_0.pt").write_bytes(b"another model")
    return open_checkpoints(root, allow_pickle=True)


def secant(source: CheckpointSource, **settings: Any) -> Prediction:
    return make_predictor("secant", **settings).fit(History(source)).predict(horizon=10)


@pytest.mark.parametrize(
    ("mesh", "placements"), [((2,), [Shard(0)]), ((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])]
)
def test_a_whole_model_is_cut_as_it_was(tmp_path: Path, mesh: Any, placements: Any) -> None:
    source = run(tmp_path / "run", mesh=mesh, placements=placements)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.pt")}
    written = make_applier("verl").apply(secant(source), alpha=1.5, out=tmp_path / "out")
    check_manifest(tmp_path / "out", contents=True)
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "30"
    assert written.shares == pytest.approx(dict.fromkeys(("rows", *(f"stack[{i}]" for i in range(3))), 1))
    files = open_shards(tmp_path / "out" / "global_step_30" / "actor", allow_pickle=True)
    for name, value in whole(45).items():
        assert torch.equal(files.read(name), value if name != "norm" else whole(30)["norm"])
    for path, content in before.items():
        assert path.read_bytes() == content
        copy = tmp_path / "out" / path.relative_to(tmp_path / "run")
        moved = path.name.startswith("model_") and path.parent.name == "actor"
        if "global_step_30" in path.parts and not moved:
            assert copy.read_bytes() == content
    again = open_checkpoints(tmp_path / "out", allow_pickle=True)  # the copies of parts agree too
    assert again.steps == (30,)


def test_the_factors_of_an_adapter_move_and_its_base_stays(tmp_path: Path) -> None:
    make_applier("verl").apply(secant(run(tmp_path / "run", lora=True)), alpha=2, out=tmp_path / "out")
    files = open_shards(tmp_path / "out" / "global_step_30" / "actor", allow_pickle=True)
    expected = lora_state(50)
    assert files.shapes.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(files.read(name), value), name


def export(root: Path, without: str = "") -> CheckpointSource:
    """Save each step to huggingface/ too, as ``save_contents: [model, hf_model]`` does; it is read from there."""
    run(root)
    for step in (0, *STEPS):
        configs = root / f"global_step_{step}" / "actor" / "huggingface"
        (configs / "tokenizer.json").write_text("{}")
        exported = {name: value for name, value in whole(step).items() if name != without}
        save_file(exported, configs / "model.safetensors")
    return open_checkpoints(root, allow_pickle=True)


def test_weights_that_were_exported_before_the_jump_are_left_out(tmp_path: Path) -> None:
    make_applier("verl").apply(secant(export(tmp_path / "run")), out=tmp_path / "out")
    configs = tmp_path / "out" / "global_step_30" / "actor" / "huggingface"
    assert {path.name for path in configs.iterdir()} == {"config.json", "tokenizer.json"}
    assert torch.equal(open_shards(configs, allow_pickle=True).read("rows"), whole(40)["rows"])


def test_a_matrix_of_the_shards_that_the_exported_models_lack_would_not_move(tmp_path: Path) -> None:
    prediction = secant(export(tmp_path / "run", without="rows"))
    with raises_kind("checkpoint-other-model", "'rows'", "huggingface"):
        make_applier("verl").apply(prediction, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_alphas_are_checkpoints_of_their_own(tmp_path: Path) -> None:
    apply_sweep(make_applier("verl"), secant(run(tmp_path / "run")), [1, 2], tmp_path / "out")
    for alpha in (1, 2):
        actor = tmp_path / "out" / f"alpha-{alpha}" / "global_step_30" / "actor"
        assert torch.equal(open_shards(actor, allow_pickle=True).read("rows"), whole(30 + 10 * alpha)["rows"])


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = secant(run(tmp_path / "run"))

    def die(what: str, path: Path) -> None:
        if what == "before renaming a folder":
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "failpoint", die)
    with pytest.raises(KeyboardInterrupt):
        make_applier("verl").apply(prediction, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_the_shards_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = run(tmp_path / "run", lora=True)
    with raises_kind("config-contradiction", "space=factors", "peft-adapter"):
        make_applier("verl").apply(secant(source, space="merged"), out=tmp_path / "out")
    for step in (0, *STEPS):
        model(tmp_path / "other" / f"checkpoint-{step}", step)
    with raises_kind("config-contradiction", "model_world_size_W_rank_R.pt", "merged-model"):
        make_applier("verl").check_source(open_checkpoints(tmp_path / "other"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_written_only_if_pickles_are_allowed(tmp_path: Path) -> None:
    export(tmp_path / "run")
    with raises_kind("checkpoint-pickle", "model_world_size_2_rank_0.pt"):
        make_applier("verl").check_source(open_checkpoints(tmp_path / "run"), tmp_path / "out")


def test_a_jump_is_rounded_to_the_precision_of_the_shards(tmp_path: Path) -> None:
    for step in (0, *STEPS):
        verl(tmp_path / "run", step, {"w": torch.full((4, 4), 1 + step / 160).bfloat16()})
    source = open_checkpoints(tmp_path / "run", allow_pickle=True)
    written = make_applier("verl").apply(secant(source), alpha=0.01, out=tmp_path / "out")
    assert written.share == 0.0  # a hundredth of 1/16 is less than half of bf16's spacing
    assert written.record["rounding"] == "nearest"


def test_the_command_writes_it_as_verl(tmp_path: Path, cli: Cli) -> None:
    run(tmp_path / "run")
    where = ("--checkpoints", tmp_path / "run", "--horizon", 10, "--out", tmp_path / "out", "--as", "verl")
    assert cli("extrapolate", *where).code == 3  # pickles are not allowed
    outcome = cli("extrapolate", *where, "--allow-pickle")
    assert outcome.code == 0, outcome.err
    assert "(verl)" in outcome.out
    actor = tmp_path / "out" / "global_step_30" / "actor"
    assert torch.equal(open_shards(actor, allow_pickle=True).read("rows"), whole(40)["rows"])

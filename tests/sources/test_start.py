"""RL that continues an adapter: it is noticed, and where it is named, deltas, jumps and norms count from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from next_core import make_applier, make_predictor, open_checkpoints
from next_core.history.history import History
from next_core.interfaces.checkpoint_source import WARNING
from next_core.notebook import open_run
from next_core.sources.adapter_files import AdapterFiles
from tests.conftest import MakeRun
from tests.errors import raises_kind
from tests.sources.models import MODULE, adapter, edit_json

NAME = f"{MODULE}.weight"
SFT = 500
EMBEDDING = {"A": (3, 5), "B": (4, 3)}


@pytest.fixture
def continued(tmp_path: Path) -> Path:
    """Checkpoints whose delta from the base is 2 (500 + step) everywhere, and the adapter ``sft`` they began from."""
    adapter(tmp_path / "sft", SFT)
    for step in (10, 20, 30):
        adapter(tmp_path / f"run/checkpoint-{step}", SFT + step)
    return tmp_path / "run"


def warnings_of(source: Any) -> list[str]:
    return [note for note in source.notes if note.startswith(WARNING)]


def test_a_first_checkpoint_far_from_the_base_is_noticed(continued: Path) -> None:
    source = open_checkpoints(continued)
    [warning] = warnings_of(source)
    assert "step 10 is 51 times" in warning  # 2 (500 + 10) against 2 * 10
    assert "--start" in warning
    with pytest.warns(UserWarning, match="--start"):
        open_run(continued)


def test_deltas_count_from_the_start_that_is_named(continued: Path, tmp_path: Path) -> None:
    source = open_checkpoints(continued, start=tmp_path / "sft")
    assert source.steps == (10, 20, 30)
    assert list(source.notes) == []
    assert torch.equal(source.delta(NAME, 30).dense(), torch.full((3, 4), 60.0).double())
    assert torch.equal(source.position(NAME, 30).dense(), torch.full((3, 4), 1060.0).double())
    assert source.logged_metrics() == {}
    assert open_run(continued, start=tmp_path / "sft").source.delta(NAME, 30).norm() == source.delta(NAME, 30).norm()


@pytest.mark.parametrize("space", ["factors", "merged"])
def test_jumps_leave_out_earlier_training(continued: Path, tmp_path: Path, cli: Callable[..., Any], space: str) -> None:
    """From 1060, on by 30/30 of the 60 that RL moved: 1120. The jump's norm is that of 60 in 12 places."""
    settings = ["--set", "anchor=backbone", "--set", f"space={space}", "--start", tmp_path / "sft", "--json"]
    ran = cli("extrapolate", "--checkpoints", continued, "--out", tmp_path / "out", "--horizon", 30, *settings)
    assert ran.code == 0, ran.err
    wrote = load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    A, B = (wrote[f"base_model.model.{MODULE}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(config["lora_alpha"] / config["r"] * B @ A, torch.full((3, 4), 1120.0))
    assert json.loads(ran.out)["norm"] == pytest.approx(60 * 12**0.5)


def test_an_adapter_in_a_subfolder_of_its_own_name_can_be_the_start(continued: Path, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "sft").rename(tmp_path / "named/policy")
    source = open_checkpoints(continued, start=tmp_path / "named")
    assert torch.equal(source.delta(NAME, 10).dense(), torch.full((3, 4), 20.0).double())


def test_what_only_the_run_trains_keeps_its_rank_and_effect(continued: Path, tmp_path: Path) -> None:
    """The adapter that RL began from may lack modules that are carried along."""
    more = {f"base_model.model.embed.lora_embedding_{side}": torch.ones(shape) for side, shape in EMBEDDING.items()}
    for folder in continued.iterdir():
        edit_json(folder / "adapter_config.json", rank_pattern={"embed": 3})
        save_file(load_file(folder / "adapter_model.safetensors") | more, folder / "adapter_model.safetensors")
    source = open_checkpoints(continued, start=tmp_path / "sft")
    prediction = make_predictor("secant", space="merged").fit(History(source)).predict(10)
    make_applier("peft-adapter", rank=1).apply(prediction, out=tmp_path / "out")
    wrote = AdapterFiles(tmp_path / "out")  # which compares ranks with the config
    assert (wrote.modules["embed"].rank, wrote.modules["embed"].scaling) == (3, 1.0)
    assert torch.equal(wrote.file.read("base_model.model.embed.lora_embedding_B"), 2 / 3 * torch.ones(EMBEDDING["B"]))
    assert wrote.modules[MODULE].rank == 1


def test_a_start_that_is_none_is_refused(continued: Path, tmp_path: Path) -> None:
    with raises_kind("checkpoint-not-found", "nowhere"):
        open_checkpoints(continued, start=tmp_path / "nowhere")
    other = adapter(tmp_path / "other", 1)
    edit_json(other / "adapter_config.json", lora_alpha=8)
    with raises_kind("checkpoint-other-model", "other", NAME):
        open_checkpoints(continued, start=other)
    adapter(continued / "checkpoint-0", SFT)
    with raises_kind("checkpoint-ambiguous-step", "checkpoint-0", "sft"):
        open_checkpoints(continued, start=tmp_path / "sft")
    assert warnings_of(open_checkpoints(continued)) == []


def test_the_start_is_no_place_to_write_to(continued: Path, tmp_path: Path) -> None:
    source = open_checkpoints(continued, start=tmp_path / "sft")
    prediction = make_predictor("secant").fit(History(source)).predict(10)
    with raises_kind("config-contradiction", "sft"):
        make_applier("peft-adapter").apply(prediction, out=tmp_path / "sft/out")


def test_a_run_from_a_fresh_adapter_gets_no_warning(make_lora_run: MakeRun, tmp_path: Path) -> None:
    for name, steps in (("early", (10, 20, 30)), ("late", (400, 410, 420))):
        assert warnings_of(open_checkpoints(make_lora_run(tmp_path / name, steps).path)) == []

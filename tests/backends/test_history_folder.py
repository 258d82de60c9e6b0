"""The part of a run folder that every backend keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import next_backends.history_folder as module
from next_backends.history_folder import HistoryFolder, JumpAdapter
from next_core.errors import ConfigError
from next_core.sources.metrics import read_metrics
from next_core.storage.manifest import check_manifest
from tests.errors import raises_kind

SHIFT = {"layer.weight.lora_A": torch.ones(2, 3)}
ADAPTER = JumpAdapter("jump-1", '{"r": 1}', {"layer.lora_A.weight": torch.zeros(1, 3)})


@pytest.fixture
def history(tmp_path: Path) -> HistoryFolder:
    return HistoryFolder(tmp_path)


def observe(history: HistoryFolder, *steps: int) -> None:
    for step in steps:
        history.checkpoint(step).mkdir(parents=True)


def jump(history: HistoryFolder, step: int, adapter: str | None = None) -> Path:
    made = history.next_jump()
    beside = None if adapter is None else JumpAdapter(adapter, ADAPTER.config, ADAPTER.tensors)
    history.write_jump(made, step, 1.0, shift=SHIFT, adapter=beside)
    return made


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_jump_is_a_record_its_shift_its_adapter_and_what_the_backend_adds(history: HistoryFolder) -> None:
    def more(folder: Path) -> None:
        save_file({"weight": torch.ones(1)}, folder / "before.safetensors")

    target = history.next_jump()
    history.write_jump(target, 10, 1.5, shift=SHIFT, adapter=ADAPTER, more=more)
    check_manifest(target)
    assert json.loads((target / "jump.json").read_text()) == {"step": 10, "alpha": 1.5, "adapter": "jump-1"}
    assert torch.equal(load_file(target / "shift.safetensors")["layer.weight.lora_A"], torch.ones(2, 3))
    assert (target / "adapter" / "adapter_config.json").read_text() == '{"r": 1}'
    assert "layer.lora_A.weight" in load_file(target / "adapter" / "adapter_model.safetensors")
    assert (target / "before.safetensors").exists()
    assert history.next_jump().name == "0002"
    (history.jumps / "jump-²").mkdir()  # a digit that is no number
    assert history.jump_at(10)[0] == target


def test_a_jump_of_nothing_but_an_adapter_or_a_shift_has_no_other_file(history: HistoryFolder) -> None:
    history.write_jump(history.next_jump(), 10, 1.0, shift={}, adapter=ADAPTER)
    history.write_jump(history.next_jump(), 20, 1.0, shift=SHIFT)
    files = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "jump.json", "manifest.json"]
    assert contents(history.jumps / "0001") == files
    assert contents(history.jumps / "0002") == ["jump.json", "manifest.json", "shift.safetensors"]


def test_a_number_is_not_used_again_while_a_later_jump_is_there(history: HistoryFolder) -> None:
    first, second = jump(history, 10), jump(history, 20)
    assert history.jump_at(20)[0] == second
    history.withdraw(first, 10)
    assert history.next_jump().name == "0003"
    history.withdraw(second, 20)
    assert history.next_jump().name == "0001"


def test_a_jump_that_cannot_be_written_leaves_nothing(history: HistoryFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritable(folder: Path) -> None:
        raise SafetensorError("invalid header")

    def broken(folder: Path) -> None:
        raise ZeroDivisionError

    def full(*args: Any, **fields: Any) -> None:
        raise OSError(28, "No space left on device")

    target = history.next_jump()
    with pytest.raises(ZeroDivisionError):
        history.write_jump(target, 10, 1.0, shift=SHIFT, more=broken)
    with raises_kind("storage-failed", "invalid header"):
        history.write_jump(target, 10, 1.0, shift=SHIFT, more=unwritable)
    with raises_kind("storage-full", "jumps/0001"):
        history.write_jump(target, 10, 1.0, shift=SHIFT, more=full)
    monkeypatch.setattr(module, "save_file", full)
    for pieces in ({"shift": SHIFT}, {"shift": {}, "adapter": ADAPTER}):
        with raises_kind("storage-full"):
            history.write_jump(target, 10, 1.0, **pieces)
    assert list(history.jumps.iterdir()) == []


def test_a_jump_is_never_written_over_another(history: HistoryFolder) -> None:
    made = jump(history, 10)
    with pytest.raises(ConfigError, match=made.name):
        history.write_jump(made, 20, 1.0, shift=SHIFT)


def test_a_jump_taken_back_at_its_own_step_is_gone_and_later_it_is_marked(history: HistoryFolder) -> None:
    jump(history, 10)
    history.withdraw(history.jumps / "0001", 10)
    assert list(history.jumps.iterdir()) == []
    made = jump(history, 10)
    assert history.jump_at(10) == (made, {"step": 10, "alpha": 1.0, "adapter": None})
    history.withdraw(made, 15)
    assert json.loads((made / "undone.json").read_text()) == {"step": 15}
    assert history.jump_at(10) is None
    assert history.jump_at(15) is None


def test_a_checkpoint_holds_the_adapters_made_by_its_step_and_not_yet_undone(history: HistoryFolder) -> None:
    assert history.active_adapters(100) == {}
    jump(history, 10, "jump-1")
    jump(history, 15)
    undone = jump(history, 20, "jump-2")
    jump(history, 30, "jump-3")
    history.withdraw(undone, 25)
    standing = {step: [*history.active_adapters(step)] for step in (9, 10, 24, 25, 30)}
    assert standing == {9: [], 10: ["jump-1"], 24: ["jump-1", "jump-2"], 25: ["jump-1"], 30: ["jump-1", "jump-3"]}


def test_a_resumed_run_forgets_what_came_after_and_the_undoing_of_what_stood(history: HistoryFolder, dead: int) -> None:
    observe(history, 0, 10, 20, 30)
    early, late, gone = jump(history, 10), jump(history, 20), jump(history, 30)
    history.withdraw(early, 15)
    history.withdraw(late, 25)
    for half in (history.checkpoints / f".step-000040.tmp-{dead}", history.jumps / f".0004.tmp-{dead}"):
        half.mkdir()
    history.forget_after(20)
    assert sorted(path.name for path in history.checkpoints.iterdir()) == ["step-000000", "step-000010", "step-000020"]
    assert not gone.exists()
    assert (early / "undone.json").exists()
    assert not (late / "undone.json").exists()
    assert sorted(path.name for path in history.jumps.iterdir()) == ["0001", "0002"]


def test_clearing_takes_our_own_and_nothing_else(history: HistoryFolder, tmp_path: Path, dead: int) -> None:
    history.clear()  # of nothing
    observe(history, 0, 10)
    jump(history, 10)
    history.log(1, {"loss": 1.0})
    (history.checkpoints / f".step-000020.tmp-{dead}").mkdir()
    kept = [tmp_path / "thesis.tex", history.checkpoints / "step-final", history.jumps / "notes"]
    for path in kept:
        path.mkdir()
    history.clear()
    left = sorted(path for path in tmp_path.rglob("*") if path not in (history.checkpoints, history.jumps))
    assert left == sorted(kept)


def test_numbers_that_are_logged_are_read_as_metrics(history: HistoryFolder) -> None:
    observe(history, 0)
    history.log(1, {"loss": 0.5, "note": "warming up", "tokens": 12})
    history.log(2, {"loss": 0.25})
    metrics = read_metrics({0: history.checkpoint(0)})
    assert metrics == {1: {"loss": 0.5, "tokens": 12.0}, 2: {"loss": 0.25}}


def numbers(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.iterdir()) if path.is_dir()]


def test_what_is_not_kept_is_deleted_and_step_0_with_the_first_jump_that_moved_it(history: HistoryFolder) -> None:
    observe(history, *range(0, 50, 5))
    for step, adapter in ((10, "jump-1"), (20, None), (40, None)):
        jump(history, step, adapter)
    history.keep([range(35, 46), range(15, 21)])
    assert numbers(history.checkpoints) == [0, 15, 20, 35, 40, 45]
    assert numbers(history.jumps) == [1, 2, 3]
    history.keep([range(35, 46)])
    assert numbers(history.checkpoints) == [35, 40, 45]  # the jump after 20 moved step 0, and is gone
    assert numbers(history.jumps) == [1, 3]  # the adapter of jump 1 is a part of the model
    history.clear()
    assert numbers(history.checkpoints) == []
    history.keep([range(35, 46)])
    assert list(history.checkpoints.iterdir()) == []


def test_a_jump_that_was_undone_stays_while_the_history_before_that_would_be_seen(history: HistoryFolder) -> None:
    observe(history, *range(0, 35, 5))
    history.withdraw(jump(history, 10), 20)
    history.keep([range(15, 31)])
    assert numbers(history.jumps) == [1]
    history.keep([range(25, 31), range(15, 19)])
    assert numbers(history.jumps) == [1]
    history.keep([range(25, 31)])
    assert numbers(history.jumps) == []


def test_a_resumed_run_needs_what_it_reads(history: HistoryFolder) -> None:
    observe(history, *range(0, 50, 5))
    history.reopen(range(0, 41), 5)  # nothing was deleted
    history.keep([range(35, 46), range(15, 21)])
    history.reopen(range(14, 21), 5)
    with raises_kind("checkpoint-no-history", "step 10"):
        history.reopen(range(10, 21), 5)
    with raises_kind("checkpoint-no-history", "step 25"):
        history.reopen(range(22, 31), 5)

"""The states that step scaling can return to: which are kept, where, and what a lost one costs."""

import copy
import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from next_core.live_weights.kept_state import KeptState
from tests.errors import raises_kind
from tests.live_weights.matrix_run import Run


def test_undo_restores_weights_and_moments_bit_for_bit_and_forgets_what_was_kept_later() -> None:
    run, other = Run(), Run()
    run.steps.keep(0)
    run.train(1, 3)
    run.steps.keep(3)
    run.train(2, 4)
    run.steps.undo(3)
    assert list(run.steps.kept) == [0, 3]
    other.train(1, 3)
    other.train(5, 2)
    run.train(5, 2)
    assert torch.equal(run.weight, other.weight)
    run.steps.undo(0)
    assert list(run.steps.kept) == [0]
    assert not any(run.optimizer.state.values())
    fresh = Run()
    fresh.train(5, 2)
    run.train(5, 2)
    assert torch.equal(run.weight, fresh.weight)


def kept_files(folder: Path) -> list[int]:
    """The steps of the states in a folder."""
    return sorted(int(file.name.split("-")[1]) for file in folder.glob("step-*-0.safetensors"))


def test_only_the_last_two_states_and_those_of_the_newest_complete_checkpoint_are_kept(tmp_path: Path) -> None:
    folder, checkpoints = tmp_path / "kept", [tmp_path / "first", tmp_path / "second"]
    run = Run(folder=folder)
    for step in (0, 80, 90, 100):
        run.steps.keep(step)
    assert list(run.steps.kept) == [0, 90, 100]  # the first weights are kept for a while
    for step in (110, 120):
        run.steps.keep(step)
    assert list(run.steps.kept) == [110, 120]
    for step, checkpoint in zip((130, 140), checkpoints, strict=True):
        checkpoint.mkdir()
        run.steps.save(checkpoint)
        (checkpoints[0] / "manifest.json").touch()  # the second is not complete
        run.steps.keep(step)
    run.steps.keep(150)
    run.steps.save(tmp_path)
    assert kept_files(folder) == [110, 120, 130, 140, 150]
    (checkpoints[1] / "manifest.json").touch()
    run.steps.keep(160)
    run.steps.close()
    assert kept_files(folder) == [120, 130, 140, 150]
    assert list(folder.glob(".*")) == []


def test_without_manifests_the_states_of_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    """OpenRLHF and verl write none, and the last may not be complete."""
    run = Run(folder=tmp_path / "kept")
    for step in (100, 110, 120, 130, 140):
        run.steps.keep(step)
        checkpoint = tmp_path / f"global_step{step}"
        checkpoint.mkdir()
        run.steps.save(checkpoint)
    run.steps.keep(150)
    run.steps.close()
    assert kept_files(tmp_path / "kept") == [120, 130, 140]


def test_a_state_that_is_written_is_in_memory_no_more(tmp_path: Path) -> None:
    def copies() -> int:
        gc.collect()
        return sum(isinstance(one, KeptState) for one in gc.get_objects())

    run, before = Run(folder=tmp_path / "kept"), copies()
    run.steps.keep(0)
    run.steps.save(tmp_path)
    assert not [name for name in load_file(tmp_path / "next-core.safetensors") if name.endswith("/weight")]
    assert copies() == before


def test_a_state_that_the_disk_refuses_stays_in_memory_and_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(state: KeptState, path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(KeptState, "write", refuse)
    run, other = Run(folder=tmp_path / "kept"), Run(folder=tmp_path / "kept")
    run.train(1, 3)
    run.steps.keep(3)
    kept = run.weight
    run.train(2, 2)
    run.steps.keep(5)
    run.steps.save(tmp_path)
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.steps.load(tmp_path)
    assert other.steps.replace_lost(5) is None
    for one in (run, other):
        one.steps.undo(3)
        assert torch.equal(one.weight, kept)


def test_a_state_whose_file_is_lost_is_not_returned_to(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    run, other = Run(folder=folder), Run(folder=folder)
    for step in (0, 10):
        run.steps.keep(step)
    run.steps.save(tmp_path)
    file = folder / "step-000010-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = run.weight
    with raises_kind("checkpoint-no-history", str(file)):
        run.steps.undo(10)
    assert torch.equal(run.weight, before)
    other.steps.load(tmp_path)
    assert "the weights of step 10, " in other.steps.replace_lost(10)
    assert list(other.steps.kept) == [0]

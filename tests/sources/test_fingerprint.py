"""A digest of all that determines the weights at a step: it follows the content, and nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.interfaces import CheckpointSource
from tests.conftest import LoraRun
from tests.errors import raises_kind
from tests.sources.models import adapter, edit_json, model, write_jump

Make = Callable[[Path], CheckpointSource]


def prints(source: CheckpointSource, *steps: int | None) -> list[str | None]:
    return [source.fingerprint(step) for step in steps]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def full(root: Path) -> CheckpointSource:
    if not root.exists() or not any(root.iterdir()):
        for step in (10, 20):
            model(root / "run" / f"checkpoint-{step}", step)
        model(root / "base", 0)
    return open_checkpoints(root / "run", backbone=root / "base")


def lora(root: Path) -> CheckpointSource:
    if not root.exists() or not any(root.iterdir()):
        for step in (10, 20):
            adapter(root / "run" / f"checkpoint-{step}", step)
    return open_checkpoints(root / "run")


@pytest.mark.parametrize("make", [full, lora])
@pytest.mark.parametrize("at", [-1, -17])
def test_any_byte_of_the_weights_changes_that_step_alone(tmp_path: Path, make: Make, at: int) -> None:
    before = prints(make(tmp_path), 10, 20, None)
    for _ in range(2):
        flip(next((tmp_path / "run" / "checkpoint-20").glob("*.safetensors")), at)
        after = prints(make(tmp_path), 10, 20, None)
        assert [one == other for one, other in zip(after, before, strict=True)] == [True, False, True]
        before = after


def test_where_rl_began_is_step_0_or_the_backbone(tmp_path: Path) -> None:
    source = full(tmp_path)
    backbone = source.fingerprint(None)
    shutil.copytree(tmp_path / "base", tmp_path / "run" / "checkpoint-0")
    alone = open_checkpoints(tmp_path / "run")
    assert alone.fingerprint(None) == alone.fingerprint(0) == backbone
    shutil.rmtree(tmp_path / "run" / "checkpoint-0")
    with raises_kind("config-missing-backbone"):
        open_checkpoints(tmp_path / "run").fingerprint(None)
    with raises_kind("checkpoint-not-found", "step 15"):
        source.fingerprint(15)
    model(tmp_path / "run" / "checkpoint-0", 5)
    source.refresh()
    assert source.fingerprint(None) == source.fingerprint(0) != backbone


def test_jumps_count_from_the_steps_before_them(own_lora_run: LoraRun) -> None:
    def now() -> list[str | None]:
        return prints(open_checkpoints(own_lora_run.path), 10, 30, 40, None)

    seen = [now()]
    folder = write_jump(own_lora_run.path.parent, 30)
    for value in (1.0, 2.0):
        save_file({"x": torch.full((2,), value)}, folder / "shift.safetensors")
        jumped = now()
        assert all(jumped[2] == before[2] and jumped[:2] != before[:2] for before in seen)
        seen.append(jumped)
    (folder / "undone.json").write_text('{"step": 30}')
    assert now() == seen[0]


@pytest.mark.parametrize("name", ["weights", "adapter_config.json"])
@pytest.mark.parametrize("make", [full, lora])
def test_there_is_none_after_a_file_was_replaced_until_it_is_read_again(tmp_path: Path, make: Make, name: str) -> None:
    source = make(tmp_path)
    before = prints(source, 10, 20)
    folder = tmp_path / "run" / "checkpoint-20"
    path = next(folder.glob("*.safetensors")) if name == "weights" or make is full else folder / name
    changed = path.with_suffix(".new")
    changed.write_bytes(path.read_bytes())
    if path.suffix == ".json":
        edit_json(changed, use_rslora=False)
    else:
        flip(changed, -1)
    changed.replace(path)  # the memory map still has the old bytes
    assert prints(source, 10, 20) == [before[0], None]
    source.refresh()
    assert source.fingerprint(20) not in (None, before[1])


def test_there_is_none_after_a_jump_was_replaced(own_lora_run: LoraRun) -> None:
    folder = write_jump(own_lora_run.path.parent, 30, {"x": torch.ones(2)})
    source = open_checkpoints(own_lora_run.path)
    assert None not in prints(source, 30, None)
    flip(folder / "shift.safetensors", -1)
    os.utime(folder / "shift.safetensors", (10, 10))
    after = prints(source, 30, 40, None)
    assert [digest is None for digest in after] == [True, False, True]

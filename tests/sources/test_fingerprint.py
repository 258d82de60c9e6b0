"""A digest of all that decides the weights at a step: it follows the content, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.storage import manifest
from next_core.storage.manifest import file_digest, sha256
from tests.conftest import LoraRun
from tests.sources.models import adapter, model


def prints(source: CheckpointSource, *steps: int | None) -> list[str | None]:
    return [source.fingerprint(step) for step in steps]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def full(root: Path) -> CheckpointSource:
    for step in (10, 20):
        model(root / "run" / f"checkpoint-{step}", step)
    model(root / "base", 0)
    return open_checkpoints(root / "run", backbone=root / "base")


def lora(root: Path) -> CheckpointSource:
    for step in (10, 20):
        adapter(root / "run" / f"checkpoint-{step}", step)
    return open_checkpoints(root / "run")


def opened_again(root: Path) -> CheckpointSource:
    return open_checkpoints(root / "run", root / "base" if (root / "base").exists() else None)


@pytest.mark.parametrize("make", [full, lora])
def test_it_is_of_the_content_and_not_of_the_place(tmp_path: Path, make: type) -> None:
    first = prints(make(tmp_path / "a"), 10, 20, None)
    assert len(set(first)) == 3
    assert prints(make(tmp_path / "b"), 10, 20, None) == first
    shutil.move(tmp_path / "a" / "run" / "checkpoint-20", tmp_path / "a" / "run" / "checkpoint-25")
    base = tmp_path / "a" / "base"
    assert prints(open_checkpoints(tmp_path / "a" / "run", base if base.exists() else None), 10, 25, None) == first


@pytest.mark.parametrize("make", [full, lora])
@pytest.mark.parametrize("at", [-1, -17])
def test_any_byte_of_the_weights_changes_that_step_alone(tmp_path: Path, make: type, at: int) -> None:
    source = make(tmp_path)
    before = prints(source, 10, 20, None)
    for _ in range(3):
        flip(next((tmp_path / "run" / "checkpoint-20").glob("*.safetensors")), at)
        source = opened_again(tmp_path)
        after = prints(source, 10, 20, None)
        assert (after[0] == before[0], after[1] == before[1], after[2] == before[2]) == (True, False, True)
        before = after


def test_the_scaling_counts(tmp_path: Path) -> None:
    before = prints(lora(tmp_path), 10, 20)
    path = tmp_path / "run" / "checkpoint-20" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    after = prints(open_checkpoints(tmp_path / "run"), 10, 20)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_where_rl_began_is_the_backbone_or_step_0(tmp_path: Path) -> None:
    source = full(tmp_path)
    began = source.fingerprint(None)
    shutil.copytree(tmp_path / "base", tmp_path / "run" / "checkpoint-0")
    alone = open_checkpoints(tmp_path / "run")
    assert alone.fingerprint(None) == alone.fingerprint(0) == began
    shutil.rmtree(tmp_path / "run" / "checkpoint-0")
    with pytest.raises(CheckpointError, match="has no backbone"):
        open_checkpoints(tmp_path / "run").fingerprint(None)
    with pytest.raises(CheckpointError, match="has no step 15"):
        source.fingerprint(15)


def test_where_an_adapter_began_is_step_0_if_it_was_kept(tmp_path: Path) -> None:
    without = lora(tmp_path).fingerprint(None)
    adapter(tmp_path / "run" / "checkpoint-0", 0)
    source = open_checkpoints(tmp_path / "run")
    assert source.fingerprint(None) == source.fingerprint(0) != without
    with pytest.raises(CheckpointError, match="step 15 was not observed"):
        source.fingerprint(15)


def test_the_jumps_since_a_step_count(own_lora_run: LoraRun) -> None:
    def now() -> list[str | None]:
        return prints(open_checkpoints(own_lora_run.path), 0, 30, 40, None)

    plain = now()
    folder = own_lora_run.path.parent / "jumps" / "0001"
    folder.mkdir(parents=True)
    (folder / "jump.json").write_text('{"step": 30, "adapter": null}')
    seen = [plain]
    for value in (1.0, 2.0):
        save_file({"x": torch.full((2,), value)}, folder / "shift.safetensors")
        jumped = now()
        assert jumped[2] == plain[2]
        assert all(one != other for before in seen for one, other in zip(jumped[:2], before[:2], strict=True))
        assert jumped[3] == jumped[0]
        seen.append(jumped)
    (folder / "undone.json").write_text('{"step": 30}')
    assert now() == plain


def test_a_file_is_hashed_once_while_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = tmp_path / "x", []

    def counted(one: Path) -> str:
        hashed.append(one)
        return sha256(one)

    monkeypatch.setattr(manifest, "sha256", counted)
    path.write_bytes(b"old")
    os.utime(path, (10, 10))
    assert file_digest(path) == file_digest(path) == sha256(path)
    assert len(hashed) == 1
    path.write_bytes(b"new")
    os.utime(path, (11, 11))
    assert file_digest(path) == sha256(path)
    now = time.time()
    for content in (b"one", b"two"):  # written twice within one tick of the file system's clock
        path.write_bytes(content)
        os.utime(path, (now, now))
        assert file_digest(path) == sha256(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x cannot be read \(No such file or directory\); restore it"):
        file_digest(path)


@pytest.mark.parametrize("make", [full, lora])
def test_of_what_was_replaced_since_it_was_opened_there_is_none_until_it_is_read_anew(
    tmp_path: Path, make: type
) -> None:
    source = make(tmp_path)
    before = prints(source, 10, 20)
    path = next((tmp_path / "run" / "checkpoint-20").glob("*.safetensors"))
    changed = path.with_suffix(".new")
    changed.write_bytes(path.read_bytes())
    flip(changed, -1)
    changed.replace(path)  # the memory map still has the old bytes
    assert prints(source, 10, 20) == [before[0], None]
    source.refresh()
    assert source.fingerprint(20) not in (None, before[1])


def test_a_config_that_changed_since_is_no_fingerprint_either(tmp_path: Path) -> None:
    source = lora(tmp_path)
    path = tmp_path / "run" / "checkpoint-20" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    assert source.fingerprint(20) is None
    source.refresh()
    assert source.fingerprint(20) is not None


def test_a_shift_that_was_replaced_since_is_no_fingerprint(own_lora_run: LoraRun) -> None:
    folder = own_lora_run.path.parent / "jumps" / "0001"
    folder.mkdir(parents=True)
    (folder / "jump.json").write_text('{"step": 30, "adapter": null}')
    save_file({"x": torch.ones(2)}, folder / "shift.safetensors")
    source = open_checkpoints(own_lora_run.path)
    assert None not in prints(source, 30, None)
    flip(folder / "shift.safetensors", -1)
    os.utime(folder / "shift.safetensors", (10, 10))
    assert prints(source, 30, 40, None) == [None, source.fingerprint(40), None]
    assert source.fingerprint(40) is not None


def test_an_index_that_names_the_other_of_two_shards_counts(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    index = folder / "model.safetensors.index.json"
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((2, 2), value), name: torch.ones(1)}, folder / f"{name}.safetensors")
    seen = []
    for where in ("a", "b"):
        index.write_text(
            json.dumps({"weight_map": {"w": f"{where}.safetensors", "a": "a.safetensors", "b": "b.safetensors"}})
        )
        seen.append(open_checkpoints(tmp_path / "run").fingerprint(10))
    assert None not in seen
    assert seen[0] != seen[1]


def test_step_0_is_where_rl_began_also_beside_a_backbone(tmp_path: Path) -> None:
    source = full(tmp_path)
    backbone = source.fingerprint(None)
    model(tmp_path / "run" / "checkpoint-0", 5)
    source.refresh()
    assert source.fingerprint(None) == source.fingerprint(0) != backbone

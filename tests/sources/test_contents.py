"""Every byte that this project wrote counts: values of a file that changed since are never used."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.storage import manifest
from next_core.storage.atomic import seal
from tests.errors import raises_kind
from tests.sources.models import MODULE, adapter, edit_json, model, write_jump

Write = Callable[[Path, float], Path]


def sealed(root: Path, write: Write, *steps: int) -> list[Path]:
    """Write checkpoints as a run of ours does."""
    folders = [write(root / "checkpoints" / f"step-{step:06d}", step) for step in steps]
    for folder in folders:
        seal(folder)
    (root / "journal.jsonl").write_bytes(b"")
    return folders


def read_all(path: Path, **options: bool) -> CheckpointSource:
    """Open, and read every value and metric."""
    source = open_checkpoints(path, **options)
    for step in source.steps:
        source.metrics(step)
        for parameter in source.parameters:
            source.delta(parameter.name, step, source.steps[0])
    return source


def flipped(path: Path, places: int) -> Iterator[None]:
    """Flip one bit of the file in each of so many places, one after another, and restore the file at the end."""
    whole = path.read_bytes()
    for at in range(0, len(whole), 1 + len(whole) // places):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        yield
    path.write_bytes(whole)


def sharded(folder: Path, step: float) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.full((2, 2), float(step))}, folder / "1.safetensors")
    save_file({"b": torch.full((2, 2), float(step))}, folder / "2.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (folder / "config.json").write_text('{"tie_word_embeddings": false, "hidden_size": 2}')
    return folder


@pytest.mark.parametrize("write", [adapter, model, sharded])
def test_a_flipped_bit_or_a_missing_file_is_named_or_skipped(tmp_path: Path, write: Write) -> None:
    *_, last = sealed(tmp_path, write, 10, 20, 30)
    for path in sorted(last.iterdir()):
        if path.name != "config.json":  # not read: there is neither head nor embedding
            for _ in flipped(path, places=40):
                with pytest.raises(CheckpointError, match=f"{last}"):
                    read_all(last.parent)
        for _ in flipped(path, places=3):
            source = read_all(last.parent, skip_damaged=True)
            assert source.steps == (10, 20)
            assert any(note.startswith(f"skipped {last}, step 30: ") for note in source.notes)
        whole = path.read_bytes()
        path.unlink()
        with raises_kind("checkpoint-incomplete", path):
            read_all(last.parent)
        assert read_all(last.parent, skip_damaged=True).steps == (10, 20)
        path.write_bytes(whole)
    assert read_all(last.parent).steps == (10, 20, 30)


def with_jump(root: Path) -> Path:
    """Write a run of adapters with a jump after step 20, in factor space and in an adapter of its own."""
    sealed(root, adapter, 10, 20)
    keys = {f"{MODULE}.weight.lora_A": torch.ones(2, 4), f"{MODULE}.weight.lora_B": torch.ones(3, 2)}
    jump = write_jump(root, 20, keys)
    adapter(jump / "adapter", 1)
    edit_json(jump / "jump.json", adapter="jump-1")
    seal(jump)
    return jump


def test_a_flipped_bit_in_a_jump_is_named(tmp_path: Path) -> None:
    jump = with_jump(tmp_path)

    def read() -> None:
        source = read_all(tmp_path / "checkpoints")
        source.position(source.parameters[0].name, 20)

    read()
    for path in sorted(path for path in jump.rglob("*") if path.is_file()):
        for _ in flipped(path, places=25):
            with pytest.raises(CheckpointError, match=f"{jump}"):
                read()
    read()


def test_opening_reads_headers_only_and_hashes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = sealed(tmp_path, model, 10, 20)
    hashed: list[str] = []
    digest_of = manifest.digest_of
    monkeypatch.setattr(
        manifest, "digest_of", lambda path, *more: (hashed.append(path.parent.name), digest_of(path))[1]
    )
    for path in (path for folder in folders for path in folder.iterdir()):
        os.utime(path, (10, 10))
    source = open_checkpoints(folders[0].parent)
    assert hashed == []
    for _ in range(2):
        source.delta("w.weight", 20, 10)
    read_all(folders[0].parent)
    assert sorted(hashed) == [folder.name for folder in folders]


def test_a_file_that_was_added_later_is_not_read(tmp_path: Path) -> None:
    *_, last = sealed(tmp_path, adapter, 10, 20)
    (last / "README.md").write_text("mine")  # nobody reads it
    read_all(last.parent)
    (last / "trainer_state.json").write_text('{"log_history": []}')
    with raises_kind("checkpoint-damaged", last / "trainer_state.json", "not listed"):
        read_all(last.parent)


def test_a_pickle_is_compared_with_the_manifest_too(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "checkpoint-10", 10, pickled=True)
    seal(folder)
    weights = folder / "adapter_model.bin"
    content = weights.read_bytes()
    at = content.index(torch.full((3, 2), 10.0).numpy().tobytes())
    weights.write_bytes(content[: at + 2] + b"\0" + content[at + 3 :])
    source = open_checkpoints(tmp_path, allow_pickle=True)
    with raises_kind("checkpoint-damaged", weights, "xxh3_128"):
        source.factors(source.parameters[0].name, 10)


def test_another_programs_manifest_above_the_checkpoints_is_ignored(tmp_path: Path) -> None:
    model(tmp_path / "checkpoint-10", 10)
    model(tmp_path / "checkpoint-20", 20)
    (tmp_path / "manifest.json").write_text('{"model": "mine", "loss": NaN}')
    assert read_all(tmp_path).steps == (10, 20)


def test_a_jump_without_a_manifest_is_read_as_it_is(tmp_path: Path) -> None:
    jump = with_jump(tmp_path)
    (jump / "manifest.json").unlink()
    assert read_all(tmp_path / "checkpoints").steps == (10, 20)
    shutil.rmtree(jump)
    assert read_all(tmp_path / "checkpoints").steps == (10, 20)

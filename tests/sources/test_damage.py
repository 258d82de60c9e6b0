"""Files that lie, links that lead out, folders that are not whole: refused by name, or left out by name on request."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.errors import CheckpointError, ConfigError
from next_core.sources.tensor_files import SafetensorsFile
from tests.conftest import STEPS, LoraRun
from tests.sources.models import adapter, model


def tensor(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def stored(header: object, data: int = 96, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


ROW = b'"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}'
LIES = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no object": stored(b"[]", 0),
    "no UTF-8": stored(b"\xff\xfe{}", 0),
    "offset beyond the file": stored({"a": tensor(0, 32), "b": tensor(64, 128)}),
    "data beyond the file": stored({"a": tensor(0, 128, shape=(4, 8))}),
    "data of nobody": stored({"a": tensor(0, 32)}),
    "a hole": stored({"a": tensor(0, 32), "b": tensor(64, 96)}),
    "overlap": stored({"a": tensor(0, 32), "b": tensor(0, 32), "c": tensor(32, 96, shape=(2, 8))}),
    "offsets the wrong way round": stored({"a": tensor(32, 0)}, 32),
    "shape": stored({"a": tensor(0, 96, shape=(5, 5))}),
    "precision": stored({"a": tensor(0, 96, "BF16", (4, 6))}),
    "unknown precision": stored({"a": tensor(0, 96, "X9", (4, 6))}),
    "negative shape": stored({"a": tensor(0, 32, shape=(-2, 4))}, 32),
    "overflow": stored({"a": tensor(0, 96, shape=(2**62, 2**62))}),
    "header longer than the file": stored({"a": tensor(0, 96)}, size=90_000_000),
    "huge header": stored({"a": tensor(0, 96)}, size=2**62),
    "nested": stored(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 0),
    "a name twice": stored(b"{" + ROW + b"," + ROW + b"}", 32),
    "a name twice with two shapes": stored(b"{" + ROW + b"," + ROW.replace(b"2,4", b"4,2") + b"}", 32),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_a_file_that_lies_is_named(tmp_path: Path, content: bytes) -> None:
    model(tmp_path / "checkpoint-10", 10)
    weights = model(tmp_path / "checkpoint-20", 20) / "model.safetensors"
    weights.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(tmp_path)
    assert str(caught.value).startswith(f"{weights} is truncated or not a safetensors file (")
    assert "remove or restore this checkpoint" in str(caught.value)


def test_the_lies_are_told_of_files_that_are_otherwise_right(tmp_path: Path) -> None:
    right = stored({"a": tensor(0, 32), "b": tensor(32, 96, "BF16", (4, 8)), "__metadata__": {"format": "pt"}})
    (tmp_path / "x.safetensors").write_bytes(right)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.shapes == {"a": (2, 4), "b": (4, 8)}
    assert (file.dtype("a"), file.dtype("b")) == (torch.float32, torch.bfloat16)
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        file.dtype("c")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    weights = model(tmp_path / "checkpoint-10", 10) / "model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(CheckpointError, match=rf"{weights} is a folder where a file is expected"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map":' * 100_000])
def test_an_index_nested_too_deeply_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    index = tmp_path / "checkpoint-10" / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=rf"{index} cannot be read"):
        open_checkpoints(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_named_with_the_right_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    save_file({"a": torch.zeros(2, 2)}, folder / "1.safetensors")
    save_file({"b": torch.zeros(2, 2)}, folder / "2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
    open_error = rf"{folder}/1\.safetensors has no 'b', which the index says it has"
    with pytest.raises(CheckpointError, match=open_error):
        open_checkpoints(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"2\.safetensors has no 'a', which the index says it has; 1\.safetensors has"
    ):
        open_checkpoints(tmp_path)


def test_a_link_out_of_a_checkpoint_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    folder = model(tmp_path / "run" / "checkpoint-10", 10)
    weights, secret = folder / "model.safetensors", tmp_path / "secret.safetensors"
    weights.rename(secret)
    for target in (secret, Path("../../secret.safetensors")):
        weights.symlink_to(target)
        with pytest.raises(CheckpointError, match=rf"{weights} is a link out of its folder, to {secret}; put the file"):
            open_checkpoints(tmp_path / "run")
        weights.unlink()
    weights.symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match=rf"{weights} is a link to a file that is gone"):
        open_checkpoints(tmp_path / "run")
    secret.rename(folder / "elsewhere")
    assert open_checkpoints(tmp_path / "run").steps == (10,)


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-10"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "secret.safetensors")
    (folder / "1.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    with pytest.raises(CheckpointError, match=rf"{folder}/1\.safetensors is a link out of its folder"):
        open_checkpoints(tmp_path / "run")


def test_folders_that_are_links_are_read(tmp_path: Path) -> None:
    for step in (10, 20):
        kept = model(tmp_path / "kept" / str(step), step)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(kept)
    assert open_checkpoints(tmp_path / "run").steps == (10, 20)
    (tmp_path / "again").symlink_to(tmp_path / "run")
    assert open_checkpoints(tmp_path / "again").steps == (10, 20)
    (tmp_path / "run" / "checkpoint-30").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"run/checkpoint-30 does not exist"):
        open_checkpoints(tmp_path / "run")


def truncate(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [truncate, empty])
@pytest.mark.parametrize("write", [adapter, model])
def test_damaged_folders_are_left_out_only_on_request_and_by_name(
    tmp_path: Path, write: Callable[[Path, float], Path], damage: Callable[[Path], None]
) -> None:
    folders = [write(tmp_path / f"checkpoint-{step}", step) for step in (10, 20, 30, 40)]
    damage(folders[1])
    with pytest.raises(CheckpointError, match="checkpoint-20"):
        open_checkpoints(tmp_path)
    source = open_checkpoints(tmp_path, skip_damaged=True)
    assert source.steps == (10, 30, 40)
    [note] = source.notes  # and step 20 is not said to be missing as well
    assert note.startswith(f"left out {folders[1]}, step 20: ")
    assert "checkpoint-20" in note.split(": ", 1)[1]
    for folder in (folders[0], *folders[2:]):
        damage(folder)
    with pytest.raises(
        CheckpointError, match=rf"every checkpoint under {tmp_path} is damaged; left out .*checkpoint-10"
    ):
        open_checkpoints(tmp_path, layout=source.name, skip_damaged=True)


def test_a_folder_that_is_completed_later_is_taken_in(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        adapter(tmp_path / f"checkpoint-{step}", step)
    weights = tmp_path / "checkpoint-30" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    source = open_checkpoints(tmp_path, skip_damaged=True)
    assert source.steps == (10, 20)
    weights.write_bytes(whole)
    source.refresh()
    assert source.steps == (10, 20, 30)
    assert source.notes == []


def test_checkpoints_of_another_run_are_no_damage(tmp_path: Path) -> None:
    model(tmp_path / "checkpoint-10", 10)
    model(tmp_path / "checkpoint-20", 20, other=torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match="'other' is new, step 10 does not have it"):
        open_checkpoints(tmp_path, skip_damaged=True)


def test_a_checkpoint_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    for step in (10, 20):
        adapter(tmp_path / f"checkpoint-{step}", step)
    source = open_checkpoints(tmp_path)
    name = source.parameters[0].name
    before = source.factors(name, 20)
    assert before is not None
    shutil.rmtree(tmp_path / "checkpoint-20")
    adapter(tmp_path / "checkpoint-20", 7)
    source.refresh()
    after = source.factors(name, 20)
    assert after is not None
    assert (float(before.B.max()), float(after.B.max())) == (20, 7)


def test_a_trainers_names_that_appear_later_win(tmp_path: Path) -> None:
    adapter(tmp_path / "lora-20", 20)
    source = open_checkpoints(tmp_path)
    adapter(tmp_path / "checkpoint-20", 7)
    source.refresh()
    after = source.factors(source.parameters[0].name, 20)
    assert after is not None
    assert float(after.B.max()) == 7


def test_a_live_run_stops_at_a_damaged_checkpoint_and_keeps_what_it_had(own_lora_run: LoraRun) -> None:
    source = open_checkpoints(own_lora_run.path)
    truncate(own_lora_run.folder(60))
    with pytest.raises(CheckpointError, match=r"checkpoint-60/adapter_model\.safetensors is truncated"):
        source.refresh()
    assert source.steps == STEPS


def test_a_source_of_others_without_the_setting_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from next_core.settings import Settings
    from next_core.sources.full_model import FullModelSource

    class Plain(Settings):
        path: Path
        backbone: Path | None = None

    monkeypatch.setattr(FullModelSource, "config_class", Plain)
    model(tmp_path / "checkpoint-10", 10)
    with pytest.raises(ConfigError, match="the source 'full-model' has no setting 'skip_damaged'"):
        open_checkpoints(tmp_path, skip_damaged=True)


def test_finite_values_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    save_file({"a": torch.full((4,), 3e38)}, tmp_path / "x.safetensors")
    assert SafetensorsFile(tmp_path / "x.safetensors").read("a").tolist() == pytest.approx([3e38] * 4)


def test_a_folder_that_was_being_written_in_place_is_named_or_left_out(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        model(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-20" / "INCOMPLETE.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-20 was being written in place"):
        open_checkpoints(tmp_path)
    source = open_checkpoints(tmp_path, skip_damaged=True)
    assert source.steps == (10, 30)
    assert any("written in place" in note for note in source.notes)

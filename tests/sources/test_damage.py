"""Malformed files, links that lead outside, incomplete folders: refused by name, or skipped on request."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from next_core import open_checkpoints
from next_core.settings import Settings
from next_core.sources.full_model import FullModelSource
from next_core.sources.tensor_files import SafetensorsFile
from tests.conftest import STEPS, LoraRun
from tests.errors import raises_kind
from tests.sources.models import adapter, model


def tensor(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def stored(header: object, data: int = 96, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


ROW = b'"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}'
MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no object": stored(b"[]", 0),
    "no UTF-8": stored(b"\xff\xff{}", 0),
    "offset beyond the file": stored({"a": tensor(0, 32), "b": tensor(64, 128)}),
    "data beyond the file": stored({"a": tensor(0, 128, shape=(4, 8))}),
    "unclaimed data": stored({"a": tensor(0, 32)}),
    "a hole": stored({"a": tensor(0, 32), "b": tensor(64, 96)}),
    "overlap": stored({"a": tensor(0, 32), "b": tensor(0, 32), "c": tensor(32, 96, shape=(2, 8))}),
    "reversed offsets": stored({"a": tensor(32, 0)}, 32),
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


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_named(tmp_path: Path, content: bytes) -> None:
    model(tmp_path / "checkpoint-10", 10)
    weights = model(tmp_path / "checkpoint-20", 20) / "model.safetensors"
    weights.write_bytes(content)
    with raises_kind("checkpoint-damaged", f"{weights} is truncated or not a safetensors file"):
        open_checkpoints(tmp_path)


def test_a_file_written_in_the_same_way_but_correct_is_read(tmp_path: Path) -> None:
    right = stored({"a": tensor(0, 32), "b": tensor(32, 96, "BF16", (4, 8)), "__metadata__": {"format": "pt"}})
    (tmp_path / "x.safetensors").write_bytes(right)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.shapes == {"a": (2, 4), "b": (4, 8)}
    assert (file.dtype("a"), file.dtype("b")) == (torch.float32, torch.bfloat16)
    with raises_kind("checkpoint-not-found", file.path, "'c'"):
        file.dtype("c")


def test_finite_values_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    save_file({"a": torch.full((4,), 3e38)}, tmp_path / "x.safetensors")
    assert SafetensorsFile(tmp_path / "x.safetensors").read("a").tolist() == pytest.approx([3e38] * 4)


def test_an_index_that_names_the_wrong_shard_is_corrected_by_the_message(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    save_file({"a": torch.zeros(2, 2)}, folder / "1.safetensors")
    save_file({"b": torch.zeros(2, 2)}, folder / "2.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    with raises_kind("checkpoint-damaged", f"{folder}/2.safetensors has no 'a'", "1.safetensors has it"):
        open_checkpoints(tmp_path)


def test_two_shards_with_one_tensor_are_damage(tmp_path: Path) -> None:
    """Readers differ: some follow the index, and transformers takes the last shard's."""
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    for name in "ab":
        save_file({"w": torch.ones(2, 2), name: torch.ones(2)}, folder / f"{name}.safetensors")
    shards = {"w": "a.safetensors", "a": "a.safetensors", "b": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with raises_kind("checkpoint-damaged", "a.safetensors", "b.safetensors", "'w'"):
        open_checkpoints(tmp_path)


def test_a_link_out_of_a_checkpoint_is_refused_and_one_inside_is_followed(tmp_path: Path) -> None:
    folder = model(tmp_path / "run" / "checkpoint-10", 10)
    weights, secret = folder / "model.safetensors", tmp_path / "secret.safetensors"
    weights.rename(secret)
    for target in (secret, Path("../../secret.safetensors")):
        weights.symlink_to(target)
        with raises_kind("checkpoint-unsafe-path", weights, secret):
            open_checkpoints(tmp_path / "run")
        weights.unlink()
    weights.symlink_to("elsewhere")
    with raises_kind("checkpoint-incomplete", weights):
        open_checkpoints(tmp_path / "run")
    secret.rename(folder / "elsewhere")
    assert open_checkpoints(tmp_path / "run").steps == (10,)


def test_folders_that_are_links_are_read(tmp_path: Path) -> None:
    for step in (10, 20):
        kept = model(tmp_path / "kept" / str(step), step)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(kept)
    (tmp_path / "again").symlink_to(tmp_path / "run")
    assert open_checkpoints(tmp_path / "run").steps == open_checkpoints(tmp_path / "again").steps == (10, 20)
    (tmp_path / "run" / "checkpoint-30").symlink_to(tmp_path / "gone")
    with raises_kind("checkpoint-not-found", "run/checkpoint-30"):
        open_checkpoints(tmp_path / "run")


def truncate(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [truncate, empty])
@pytest.mark.parametrize("write", [adapter, model])
def test_damaged_folders_are_skipped_on_request(
    tmp_path: Path, write: Callable[[Path, float], Path], damage: Callable[[Path], None]
) -> None:
    folders = [write(tmp_path / f"checkpoint-{step}", step) for step in (10, 20, 30, 40)]
    damage(folders[1])
    kind = "checkpoint-damaged" if damage is truncate else "checkpoint-incomplete"
    kind = "checkpoint-not-found" if (write, damage) == (model, empty) else kind
    with raises_kind(kind, "checkpoint-20", "--skip-damaged") as caught:
        open_checkpoints(tmp_path)
    assert "written" not in caught.value.message
    source = open_checkpoints(tmp_path, skip_damaged=True)
    assert source.steps == (10, 30, 40)
    [note] = source.notes  # and step 20 is not reported as missing too
    assert note.startswith(f"skipped {folders[1]}, step 20: ")
    damage(folders[3])
    with raises_kind(kind, "checkpoint-40", "may still be being written", "--skip-damaged"):
        open_checkpoints([folders[0], folders[2], folders[3]])
    for folder in (folders[0], folders[2]):
        damage(folder)
    with raises_kind("checkpoint-damaged", tmp_path, "checkpoint-10"):
        open_checkpoints(tmp_path, layout=source.name, skip_damaged=True)


def test_a_folder_that_is_completed_later_is_read(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        adapter(tmp_path / f"checkpoint-{step}", step)
    weights = tmp_path / "checkpoint-30" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    source = open_checkpoints(tmp_path, skip_damaged=True)
    assert source.steps == (10, 20)
    weights.write_bytes(whole)
    source.refresh()
    assert (source.steps, source.notes) == ((10, 20, 30), [])


def test_a_checkpoint_of_another_run_is_not_skipped_as_damaged(tmp_path: Path) -> None:
    model(tmp_path / "checkpoint-10", 10)
    model(tmp_path / "checkpoint-20", 20, other=torch.zeros(2, 2))
    with raises_kind("checkpoint-other-model", "'other'", "step 10"):
        open_checkpoints(tmp_path, skip_damaged=True)


@pytest.mark.parametrize("first", ["checkpoint-20", "lora-20"])
def test_a_checkpoint_that_was_replaced_is_read_again(tmp_path: Path, first: str) -> None:
    adapter(tmp_path / first, 20)
    source = open_checkpoints(tmp_path)
    name = source.parameters[0].name
    assert float(source.factors(name, 20).B.max()) == 20
    shutil.rmtree(tmp_path / "checkpoint-20", ignore_errors=True)
    adapter(tmp_path / "checkpoint-20", 7)  # takes precedence over lora-20
    source.refresh()
    assert float(source.factors(name, 20).B.max()) == 7


def test_a_live_run_stops_at_a_damaged_checkpoint_and_keeps_what_it_had(own_lora_run: LoraRun) -> None:
    source = open_checkpoints(own_lora_run.path)
    truncate(own_lora_run.folder(60))
    with raises_kind("checkpoint-damaged", "checkpoint-60/adapter_model.safetensors"):
        source.refresh()
    assert source.steps == STEPS


def test_a_setting_that_a_third_partys_source_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Settings):
        path: Path
        backbone: Path | None = None

    monkeypatch.setattr(FullModelSource, "config_class", Plain)
    model(tmp_path / "checkpoint-10", 10)
    with raises_kind("config-unknown-key", "full-model", "skip_damaged"):
        open_checkpoints(tmp_path, skip_damaged=True)

"""A manifest tells of every file what it was, and of itself whether it is what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from next_core.errors import CheckpointError
from next_core.storage.manifest import check_contents, check_manifest, manifest_text, sha256
from next_core.storage.reading import with_checksum


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one text, one file of tensors, and its manifest."""
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "a.txt").write_text("text")
    save_file({"w": torch.ones(2, 3).bfloat16()}, made / "sub" / "x.safetensors")
    (made / "manifest.json").write_text(manifest_text(made))
    return made


def write(folder: Path, files: Mapping[str, Any] | Any) -> None:
    (folder / "manifest.json").write_bytes(with_checksum(json.dumps({"files": files})))


def test_it_tells_sha256_size_precision_and_shape(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    weights = folder / "sub" / "x.safetensors"
    assert files == {
        "a.txt": {"sha256": sha256(folder / "a.txt"), "size": 4},
        "sub/x.safetensors": {
            "sha256": sha256(weights),
            "size": weights.stat().st_size,
            "tensors": {"w": {"dtype": "BF16", "shape": [2, 3]}},
        },
    }
    check_manifest(folder, contents=True)


def test_contents_of_the_same_size_are_compared_on_request(folder: Path) -> None:
    (folder / "a.txt").write_text("tex_")
    check_manifest(folder)
    with pytest.raises(CheckpointError, match=r"a\.txt is damaged: its sha256 is not what manifest\.json says"):
        check_manifest(folder, contents=True)
    with pytest.raises(CheckpointError, match=r"a\.txt is damaged"):
        check_contents(folder / "a.txt")
    (folder / "a.txt").write_text("text")
    check_contents(folder / "a.txt")


def test_a_header_of_the_same_size_that_tells_other_things_is_named_without_reading_the_rest(folder: Path) -> None:
    weights = folder / "sub" / "x.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"[2,3]", b"[3,2]"))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged: its header is not what manifest\.json"):
        check_manifest(folder)


def test_a_file_is_looked_up_in_the_manifest_of_its_folder_or_of_the_one_above(folder: Path) -> None:
    weights = folder / "sub" / "x.safetensors"
    check_contents(weights)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        check_contents(weights)
    (folder / "sub" / "foreign").write_text("")
    with pytest.raises(CheckpointError, match=rf"sub/foreign is not listed in {folder}/manifest\.json; somebody else"):
        check_contents(folder / "sub" / "foreign")
    check_contents(folder.parent / "unknown")  # nothing is known of it


def test_a_huge_file_in_the_place_of_one_is_not_read(folder: Path) -> None:
    with (folder / "a.txt").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(CheckpointError, match=r"a\.txt is missing or truncated \(4 bytes expected\)"):
        check_contents(folder / "a.txt")


def test_a_fifo_in_the_place_of_a_file_or_of_the_manifest_is_not_waited_for(folder: Path) -> None:
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(CheckpointError, match=r"a\.txt is missing or truncated"):
        check_manifest(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read \(it is no regular file\)"):
        check_manifest(folder)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read \(it is no regular file\)"):
        check_contents(folder / "a.txt")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "a\0b"])
def test_a_name_that_leads_out_is_refused_though_the_checksum_is_right(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    write(folder, {name: {"sha256": sha256(folder.parent / "secret"), "size": 1}})
    with pytest.raises(CheckpointError, match=r"manifest\.json names a file outside its folder"):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["", ".", "a" * 300, "\ud800", "sub"])
def test_a_name_that_is_none_of_a_file_is_missing(folder: Path, name: str) -> None:
    write(folder, {name: {"sha256": "", "size": 1}})
    with pytest.raises(CheckpointError, match="is missing or truncated"):
        check_manifest(folder, contents=True)


@pytest.mark.parametrize(
    "files",
    [None, [], {"a.txt": 1}, {"a.txt": {}}, {"a.txt": {"sha256": "0"}}, {"a.txt": {"sha256": 0, "size": 4}}]
    + [{"a.txt": {"sha256": "0", "size": size}} for size in ("4", 4.0, True, None)],
)
def test_entries_of_another_kind_are_refused_though_the_checksum_is_right(folder: Path, files: Any) -> None:
    write(folder, files)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read \(it does not name files with their"):
        check_manifest(folder)


def test_a_manifest_without_its_checksum_is_refused(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read \(it has no checksum\)"):
        check_manifest(folder)


def test_a_manifest_that_was_replaced_is_read_anew(folder: Path) -> None:
    for path in (folder / "manifest.json", folder / "a.txt"):
        os.utime(path, (10, 10))
    check_contents(folder / "a.txt")
    (folder / "a.txt").write_text("other")
    (folder / "manifest.json").write_text(manifest_text(folder))
    check_contents(folder / "a.txt")

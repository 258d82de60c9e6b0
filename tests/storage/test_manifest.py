"""A manifest describes every file of a folder and is itself protected by a checksum."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from next_core.storage import manifest
from next_core.storage.manifest import check_contents, check_manifest, digest_of, file_digest, manifest_text
from next_core.storage.reading import with_checksum
from tests.errors import raises_kind


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one text, one file of tensors, and its manifest."""
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "a.txt").write_text("text")
    save_file({"w": torch.ones(2, 3).bfloat16()}, made / "sub" / "x.safetensors")
    (made / "manifest.json").write_text(manifest_text(made))
    return made


def write(folder: Path, files: Any) -> None:
    (folder / "manifest.json").write_bytes(with_checksum(json.dumps({"files": files})))


def test_it_has_the_digest_and_size_of_files_and_the_precision_and_shape_of_tensors(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    weights = folder / "sub" / "x.safetensors"
    assert files == {
        "a.txt": {"xxh3_128": digest_of(folder / "a.txt"), "size": 4},
        "sub/x.safetensors": {
            "xxh3_128": digest_of(weights),
            "size": weights.stat().st_size,
            "tensors": {"w": {"dtype": "BF16", "shape": [2, 3]}},
        },
    }
    check_manifest(folder, contents=True)


def test_contents_of_the_same_size_are_compared_on_request(folder: Path) -> None:
    (folder / "a.txt").write_text("tex_")
    check_manifest(folder)
    with raises_kind("checkpoint-damaged", folder / "a.txt", "xxh3_128"):
        check_manifest(folder, contents=True)
    with raises_kind("checkpoint-damaged", folder / "a.txt"):
        check_contents(folder / "a.txt")
    (folder / "a.txt").write_text("text")
    check_contents(folder / "a.txt")


def test_a_manifest_with_sha256_is_still_verified(folder: Path) -> None:
    facts = {"sha256": hashlib.sha256(b"text").hexdigest(), "size": 4}
    write(folder, {"a.txt": facts})
    check_manifest(folder, contents=True)
    check_contents(folder / "a.txt")
    (folder / "a.txt").write_text("tex_")
    with raises_kind("checkpoint-damaged", folder / "a.txt", "sha256"):
        check_contents(folder / "a.txt")


def test_a_changed_header_is_found_without_reading_the_rest(folder: Path) -> None:
    weights = folder / "sub" / "x.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"[2,3]", b"[3,2]"))
    with raises_kind("checkpoint-damaged", weights, "header"):
        check_manifest(folder)


def test_a_file_is_looked_up_in_the_manifest_of_its_folder_or_of_the_one_above(folder: Path) -> None:
    weights = folder / "sub" / "x.safetensors"
    check_contents(weights)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with raises_kind("checkpoint-damaged", weights):
        check_contents(weights)
    (folder / "sub" / "foreign").write_text("")
    with raises_kind("checkpoint-damaged", "sub/foreign", folder / "manifest.json", "remove it"):
        check_contents(folder / "sub" / "foreign")
    check_contents(folder.parent / "unknown")  # no manifest lists it


def test_a_missing_shorter_or_larger_file_is_named_with_its_size(folder: Path) -> None:
    for size in (3, 2**43):
        with (folder / "a.txt").open("wb") as file:
            file.truncate(size)
        for check, path in ((check_manifest, folder), (check_contents, folder / "a.txt")):
            with raises_kind("checkpoint-incomplete", folder / "a.txt", "4 bytes"):
                check(path)
    (folder / "a.txt").unlink()
    with raises_kind("checkpoint-incomplete", folder / "a.txt"):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "a\0b"])
def test_names_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    write(folder, {name: {"xxh3_128": digest_of(folder.parent / "secret"), "size": 1}})
    with raises_kind("checkpoint-unsafe-path", folder / "manifest.json"):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["", ".", "a" * 300, "\ud800", "sub"])
def test_a_name_that_is_not_that_of_a_file_is_missing(folder: Path, name: str) -> None:
    write(folder, {name: {"sha256": "", "size": 1}})
    with raises_kind("checkpoint-incomplete"):
        check_manifest(folder, contents=True)


FILES = [None, [], {"a.txt": 1}, {"a.txt": {}}, {"a.txt": {"sha256": "0"}}, {"a.txt": {"sha256": 0, "size": 4}}]


@pytest.mark.parametrize("files", [*FILES, *({"a.txt": {"sha256": "0", "size": size}} for size in ("4", 4.0, True))])
def test_malformed_entries_are_refused_though_the_checksum_is_right(folder: Path, files: Any) -> None:
    write(folder, files)
    with raises_kind("checkpoint-damaged", folder / "manifest.json"):
        check_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {}}', "[" * 100_000])
def test_a_manifest_without_its_checksum_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with raises_kind("checkpoint-damaged", folder / "manifest.json"):
        check_manifest(folder)


def test_a_replaced_manifest_is_read_again(folder: Path) -> None:
    for path in (folder / "manifest.json", folder / "a.txt"):
        os.utime(path, (10, 10))
    check_contents(folder / "a.txt")
    (folder / "a.txt").write_text("other")
    (folder / "manifest.json").write_text(manifest_text(folder))
    check_contents(folder / "a.txt")


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = tmp_path / "x", []
    monkeypatch.setattr(manifest, "digest_of", lambda *one: (hashed.append(one), digest_of(*one))[1])
    path.write_bytes(b"old")
    os.utime(path, (10, 10))
    assert file_digest(path) == file_digest(path) == digest_of(path)
    assert len(hashed) == 1
    path.write_bytes(b"new")
    os.utime(path, (11, 11))
    assert file_digest(path) == digest_of(path)
    now = path.stat().st_ctime
    for content in (b"one", b"two"):  # written twice within one tick of the file system's clock
        path.write_bytes(content)
        os.utime(path, (now, now))
        assert file_digest(path) == digest_of(path)
    path.unlink()
    with raises_kind("checkpoint-damaged", path, "No such file"):
        file_digest(path)

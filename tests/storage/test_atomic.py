"""A reader sees the old state or the new one, whatever fails half-way."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors import SafetensorError

from next_core.errors import StorageError
from next_core.storage import atomic, manifest
from next_core.storage.atomic import (
    atomic_file,
    check_can_be_folder,
    disk_operation,
    enough_space,
    free_bytes,
    fresh_directory,
    is_full,
    new_directory,
    recover,
    sweep,
    write_text,
)
from next_core.storage.manifest import check_manifest
from tests.errors import raises_kind


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str = "new", **options: Any) -> None:
    with new_directory(target, **options) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")


def test_a_directory_appears_complete_with_a_manifest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    write(target, "text")
    assert names(target.parent) == ["target"]
    files = json.loads((target / "manifest.json").read_text())["files"]
    assert set(files) == {"a.txt", "sub/b.txt"}
    assert files["a.txt"] == {"xxh3_128": xxhash.xxh3_128(b"text").hexdigest(), "size": 4}
    check_manifest(target)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_after_an_error_the_target_is_what_it_was(tmp_path: Path, error: BaseException, existed: bool) -> None:
    target = tmp_path / "target"
    if existed:
        write(target, "old")
    with pytest.raises(type(error)), new_directory(target, overwrite=True) as folder:
        assert folder.parent == tmp_path  # on the same file system, so that the rename is atomic
        (folder / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == (["target"] if existed else [])
    assert not existed or (target / "a.txt").read_text() == "old"


def test_an_error_of_the_last_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    write(target, "old")
    rename = Path.rename
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # a file system that cannot

    def failing(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("no more names")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with raises_kind("storage-failed", "no more names"):
        write(target, "new", overwrite=True)
    assert names(tmp_path) == ["target"]
    assert (target / "a.txt").read_text() == "old"


def test_an_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "old")
    with raises_kind("config-folder-not-empty", target):
        write(target)
    assert (target / "a.txt").read_text() == "old"
    write(target, overwrite=True)
    assert names(tmp_path) == ["target"]
    assert (target / "a.txt").read_text() == "new"


def test_a_copied_manifest_is_replaced_and_not_listed(tmp_path: Path) -> None:
    write(tmp_path / "first")
    with new_directory(tmp_path / "second") as folder:
        (folder / "manifest.json").write_text((tmp_path / "first" / "manifest.json").read_text())
        (folder / "c.txt").write_text("c")
    assert set(json.loads((tmp_path / "second" / "manifest.json").read_text())["files"]) == {"c.txt"}
    check_manifest(tmp_path / "second")


def test_files_hashed_while_being_written_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = manifest.digest_of
    monkeypatch.setattr(manifest, "digest_of", lambda path, *more: (read.append(path.name), real(path, *more))[1])
    digests: dict[str, str] = {}
    with new_directory(tmp_path / "target", digests=digests) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
        digests["a.txt"] = xxhash.xxh3_128(b"a").hexdigest()
    assert read == ["b.txt"]
    check_manifest(tmp_path / "target", contents=True)


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="half"), atomic_file(path) as scratch:
        scratch.write_text("half")
        raise ValueError("half")
    assert path.read_text() == "old"

    def full(descriptor: int) -> None:
        raise OSError("full")

    with monkeypatch.context() as patched:
        patched.setattr(atomic.os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            write_text(path, "new")
    assert path.read_text() == "old"
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]
    assert path.read_text() == "new"


def test_nothing_is_written_that_does_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path / "not" / "there") > 0
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 1_000_000)
    with enough_space(tmp_path / "out", 1_000_000):
        pass
    with raises_kind("storage-full", tmp_path / "out", "2.0 MB", "1.0 MB"):
        enough_space(tmp_path / "out", 2_000_000).__enter__()
    with raises_kind("storage-full", "a.bin", "0.5 MB", "1.0 MB"), enough_space(tmp_path / "out", 500_000):
        raise OSError(28, "No space left on device", str(tmp_path / "a.bin"))


def test_leftovers_of_killed_processes_are_removed_for_one_target_only(tmp_path: Path, dead: int) -> None:
    target, ours = tmp_path / "target", f".target.tmp-{os.getpid()}"
    for name in (ours, f".target.tmp-{dead}", f".other.tmp-{dead}", ".target.tmp-1", f".target.old-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    write(target)
    assert names(tmp_path) == sorted([f".other.tmp-{dead}", ".target.tmp-1", "target"])
    assert names(target) == ["a.txt", "manifest.json", "sub"]


def test_a_folder_that_a_killed_process_moved_aside_is_put_back_unless_it_was_replaced(
    tmp_path: Path, dead: int
) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / f".{name}.old-{dead}").mkdir()
        (tmp_path / f".{name}.old-{dead}" / "weights").write_text("the only copy")
    (tmp_path / "step-2").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert (tmp_path / "step-1" / "weights").read_text() == "the only copy"


@pytest.mark.parametrize("can", [True, False], ids=["exchanged", "in two renames"])
def test_a_reader_finds_the_old_or_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    target = tmp_path / "target"
    write(target, "old")
    seen: list[str | None] = []

    def look(what: str, path: Path) -> None:
        seen.append((target / "a.txt").read_text() if (target / "a.txt").exists() else None)

    monkeypatch.setattr(atomic, "failpoint", look)
    if not can:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    write(target, "new", overwrite=True)
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert (None in seen) is not can
    assert names(tmp_path) == ["target"]


def test_a_fresh_folder_takes_over_once_it_is_committed(tmp_path: Path, dead: int) -> None:
    target, aside = tmp_path / "run", tmp_path / f".run.old-{dead}"
    for committed in (False, True):
        for folder, text in ((aside, "old"), (target, "new")):
            folder.mkdir(exist_ok=True)
            (folder / "text").write_text(text)
        if committed:
            (target / "config.yaml").write_text("")
        recover(target, "config.yaml")
        assert names(tmp_path) == ["run"]
        assert (target / "text").read_text() == ("new" if committed else "old")


@pytest.mark.parametrize(
    ("number", "kind"), [(28, "storage-full"), (30, "storage-not-writable"), (5, "storage-failed")]
)
def test_an_error_of_the_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    with raises_kind(kind, tmp_path, "target") as caught:
        write(tmp_path / "target")
    assert isinstance(caught.value, StorageError)
    assert caught.value.errno == number
    assert names(tmp_path) == []


def test_a_full_disk_is_recognised_by_its_text_where_a_library_keeps_no_more() -> None:
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_full(wrapped)
    assert is_full(ValueError("I/O error: No space left on device (os error 28)"))
    assert not is_full(ValueError("full of beans"))


@pytest.mark.parametrize(
    ("number", "kind"), [(28, "storage-full"), (13, "storage-not-writable"), (2, "storage-failed")]
)
def test_a_disk_error_in_the_words_of_safetensors_has_the_same_kind(tmp_path: Path, number: int, kind: str) -> None:
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    with raises_kind(kind, tmp_path) as caught, disk_operation("writing", tmp_path):
        raise SafetensorError(text)
    assert caught.value.errno == number


def test_a_folder_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "mkdir", full)
    with raises_kind("storage-full"), fresh_directory(tmp_path / "run", "config.yaml"):
        pass
    assert names(tmp_path) == ["run"]


def test_a_file_and_what_lies_in_one_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_can_be_folder(tmp_path / "new" / "folder")
    for path in (tmp_path / "file", tmp_path / "file" / "new" / "folder"):
        with raises_kind("config-folder-not-empty", tmp_path / "file", path):
            check_can_be_folder(path)


def test_text_that_is_not_utf_8_is_written_as_it_was_read(tmp_path: Path) -> None:
    text = b"caf\xe9".decode(errors="surrogateescape")
    write_text(tmp_path / "x", text, errors="surrogateescape")
    assert (tmp_path / "x").read_bytes() == b"caf\xe9"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", text)

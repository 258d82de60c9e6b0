"""A reader sees the old state or the new one, whatever fails half-way."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from next_core.errors import CheckpointError, ConfigError, NextCoreError, StorageError
from next_core.storage import atomic as storage
from next_core.storage import manifest
from next_core.storage.atomic import (
    atomic_file,
    changing_in_place,
    enough_space,
    free_bytes,
    is_full,
    new_directory,
    recover,
    sweep,
    write_text,
)
from next_core.storage.manifest import INCOMPLETE, check_manifest, manifest_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str = "new", **options: Any) -> None:
    with new_directory(target, **options) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")


def write_half(target: Path, error: BaseException) -> None:
    with new_directory(target, overwrite=True) as folder:
        (folder / "a.txt").write_text("half")
        raise error


def test_a_directory_appears_whole_with_a_manifest_of_its_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    write(target, "text")
    assert names(target.parent) == ["target"]
    files = json.loads((target / "manifest.json").read_text())["files"]
    assert set(files) == {"a.txt", "sub/b.txt"}
    assert files["a.txt"] == {"sha256": hashlib.sha256(b"text").hexdigest(), "size": 4}
    check_manifest(target)


def test_nothing_is_visible_until_the_directory_is_whole(tmp_path: Path) -> None:
    with new_directory(tmp_path / "target") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "target").exists()
        assert folder.parent == tmp_path  # the same file system, so that the rename is atomic


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_an_error_inside_leaves_neither_the_target_nor_anything_temporary(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_half(tmp_path / "target", error)
    assert names(tmp_path) == []


def test_an_error_inside_keeps_what_was_to_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "old")
    with pytest.raises(OSError, match="full"):
        write_half(target, OSError("full"))
    assert names(tmp_path) == ["target"]
    assert (target / "a.txt").read_text() == "old"


def test_an_error_of_the_last_rename_puts_back_what_was_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write(target, "old")
    rename = Path.rename
    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)  # a file system that cannot

    def failing(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("no more names")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no more names"):
        write(target, "new", overwrite=True)
    assert names(tmp_path) == ["target"]
    assert (target / "a.txt").read_text() == "old"


def test_a_directory_that_exists_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(target, "old")
    with pytest.raises(ConfigError, match=r"target exists already; choose another folder or remove it"):
        write(target)
    assert (target / "a.txt").read_text() == "old"
    write(target, overwrite=True)
    assert names(tmp_path) == ["target"]
    assert (target / "a.txt").read_text() == "new"


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "getpid", lambda: 7)
    (tmp_path / ".target.tmp-7").mkdir()
    (tmp_path / ".target.tmp-7" / "stale.txt").write_text("stale")
    write(tmp_path / "target")
    assert names(tmp_path / "target") == ["a.txt", "manifest.json", "sub"]


def test_a_manifest_that_was_copied_in_is_replaced_and_not_listed(tmp_path: Path) -> None:
    write(tmp_path / "first")
    with new_directory(tmp_path / "second") as folder:
        (folder / "manifest.json").write_text((tmp_path / "first" / "manifest.json").read_text())
        (folder / "c.txt").write_text("c")
    assert set(json.loads((tmp_path / "second" / "manifest.json").read_text())["files"]) == {"c.txt"}
    check_manifest(tmp_path / "second")


def test_a_file_that_is_missing_or_shorter_than_its_manifest_says_is_named(tmp_path: Path) -> None:
    write(tmp_path / "target", "12345")
    (tmp_path / "target" / "a.txt").write_text("123")
    with pytest.raises(CheckpointError, match=r"a\.txt is missing or truncated \(5 bytes expected\)"):
        check_manifest(tmp_path / "target")
    (tmp_path / "target" / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.txt is missing or truncated"):
        check_manifest(tmp_path / "target")


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "[" * 100_000]
)
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "a").write_text("a")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read .* the checkpoint is incomplete"):
        check_manifest(tmp_path)


def test_a_file_is_replaced_in_one_go_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")
    assert path.read_text() == "old"

    def full(descriptor: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_files_hashed_while_they_were_written_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: (read.append(path.name), real(path))[1])
    digests: dict[str, str] = {}
    with new_directory(tmp_path / "target", digests=digests) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
        digests["a.txt"] = hashlib.sha256(b"a").hexdigest()
    assert read == ["b.txt"]
    files = json.loads((tmp_path / "target" / "manifest.json").read_text())["files"]
    assert files["a.txt"]["sha256"] == hashlib.sha256(b"a").hexdigest()


def test_a_file_is_replaced_by_what_was_written_beside_it_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(ValueError, match="half"), atomic_file(path) as scratch:
        scratch.write_text("half")
        raise ValueError("half")
    assert names(tmp_path) == ["a.bin"]
    assert path.read_text() == "old"
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]
    assert path.read_text() == "new"


def test_a_folder_that_changes_in_place_is_marked_until_all_went_well(tmp_path: Path) -> None:
    write(tmp_path / "target")
    with pytest.raises(ValueError, match="x"), changing_in_place(tmp_path / "target", {"alpha": 2}):
        assert not (tmp_path / "target" / "manifest.json").exists()
        raise ValueError("x")
    assert json.loads((tmp_path / "target" / INCOMPLETE).read_text()) == {"alpha": 2}
    with changing_in_place(tmp_path / "target", {}):
        assert INCOMPLETE not in manifest_text(tmp_path / "target")
    assert names(tmp_path / "target") == ["a.txt", "sub"]


def test_what_the_disk_has_no_room_for_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 1_000_000)
    with enough_space(tmp_path / "out", 1_000_000):
        pass
    with pytest.raises(NextCoreError, match=r"out needs 2\.0 MB but the disk has 1\.0 MB free; nothing was written"):
        enough_space(tmp_path / "out", 2_000_000).__enter__()
    full = r"full while a\.bin of .*out was written; 0\.5 MB were needed and 1\.0 MB"
    with pytest.raises(NextCoreError, match=full), enough_space(tmp_path / "out", 500_000):
        raise OSError(28, "No space left on device", str(tmp_path / "a.bin"))


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") > 0


def test_what_killed_processes_left_of_one_target_is_removed_and_nothing_else(tmp_path: Path, dead: int) -> None:
    target = tmp_path / "target"
    for name in (f".target.tmp-{dead}", f".other.tmp-{dead}", ".target.tmp-1", f".target.old-{dead}", ".target.tmp-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    write(target)
    kept = [f".other.tmp-{dead}", ".target.tmp-1", ".target.tmp-x", "target"]
    assert names(tmp_path) == sorted(kept)


def test_what_a_killed_process_put_aside_is_put_back_where_nothing_took_its_place(tmp_path: Path, dead: int) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / f".{name}.old-{dead}").mkdir()
        (tmp_path / f".{name}.old-{dead}" / "weights").write_text("the only copy")
    (tmp_path / "step-2").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert (tmp_path / "step-1" / "weights").read_text() == "the only copy"


@pytest.mark.parametrize("can", [True, False], ids=["exchanged", "in two renames"])
def test_a_reader_of_a_folder_that_is_replaced_finds_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    target = tmp_path / "target"
    write(target, "old")
    seen: list[str | None] = []

    def look(what: str, path: Path) -> None:
        seen.append((target / "a.txt").read_text() if (target / "a.txt").exists() else None)

    monkeypatch.setattr(storage, "failpoint", look)
    if not can:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    write(target, "new", overwrite=True)
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert (None in seen) is not can
    assert names(tmp_path) == ["target"]


def test_a_folder_made_anew_is_the_old_one_until_it_is_committed(tmp_path: Path, dead: int) -> None:
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
    ("number", "remedy"), [(28, "disk is full; free some space"), (30, "may not be written"), (5, "Input/output error")]
)
def test_what_the_disk_refuses_names_the_path_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "fsync", refuse)
    with pytest.raises(StorageError, match=rf"target.*: .*{remedy}") as caught:
        write(tmp_path / "target")
    assert caught.value.errno == number
    assert names(tmp_path) == []


def test_a_full_disk_is_known_by_its_words_where_a_library_keeps_no_more(tmp_path: Path) -> None:
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_full(wrapped)
    assert is_full(ValueError("I/O error: No space left on device (os error 28)"))
    assert not is_full(ValueError("full of beans"))


def test_text_that_is_not_utf_8_passes_through(tmp_path: Path) -> None:
    text = b"caf\xe9".decode(errors="surrogateescape")
    write_text(tmp_path / "x", text, errors="surrogateescape")
    assert (tmp_path / "x").read_bytes() == b"caf\xe9"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", text)

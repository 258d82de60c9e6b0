"""Decomposed deltas are found on disk as long as their inputs are the same."""

import os
import pwd
from pathlib import Path

import pytest
import torch

from next_core.cli.options import CacheOptions
from next_core.history.delta_cache import DeltaCache
from next_core.history.history import History
from next_core.sources.memory import MemorySource
from tests.history.test_history import STEPS, Counting, full_run, lora_run


class OnDisk(MemorySource):
    """A source with fingerprints, as those on disk have."""

    salt = ""

    def fingerprint(self, step: int | None) -> str:
        return f"{self.salt}{step}"


def on_disk(run: MemorySource, salt: str = "") -> OnDisk:
    run.__class__ = OnDisk
    run.salt = salt
    return run


@pytest.fixture
def cache(tmp_path: Path) -> DeltaCache:
    return DeltaCache(tmp_path / "cache")


@pytest.mark.parametrize("run", [lora_run, full_run])
def test_a_second_history_computes_nothing_and_has_the_same_bytes(run: type, cache: DeltaCache) -> None:
    first, second = Counting(), Counting()
    wanted = History(on_disk(run()), 2, first, cache=cache)
    found = History(on_disk(run()), 2, second, cache=cache)
    for kind in ("global", "local"):
        expected = wanted.components(kind)
        for name, components in found.components(kind).items():
            for part in ("U", "S", "V", "energy", "nuclear"):
                assert torch.equal(getattr(components, part), getattr(expected[name], part))
    assert first.deltas == 4 * (4 + 3)
    assert second.deltas == 0
    assert cache.trouble is None


def test_inner_products_are_cached_too(cache: DeltaCache, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = History(on_disk(lora_run()), cache=cache).grams()
    again = on_disk(lora_run())
    history = History(again, cache=cache)
    monkeypatch.setattr(again, "factors", None)
    assert all(torch.equal(history.grams()[name], gram) for name, gram in expected.items())


def test_a_run_that_grew_computes_only_what_is_new(cache: DeltaCache) -> None:
    History(on_disk(lora_run(STEPS[:-1])), 1, Counting(), cache=cache).compress("global", "local")
    counting = Counting()
    grown = History(on_disk(lora_run()), 1, counting, cache=cache)
    grown.compress("global", "local")
    assert counting.deltas == 4 * 2
    alone = History(lora_run(), 1, Counting()).components("global")
    for name, found in grown.components("global").items():
        torch.testing.assert_close(found.lowrank().dense(), alone[name].lowrank().dense())


@pytest.mark.parametrize("change", ["weights", "rank", "spectrum", "compressor"])
def test_other_weights_or_settings_are_computed_again(change: str, cache: DeltaCache) -> None:
    first = None if change == "compressor" else Counting()
    History(on_disk(lora_run()), 1, first, cache=cache).compress("global")
    counting = Counting()
    source = on_disk(lora_run(), "other" if change == "weights" else "")
    rank = 2 if change == "rank" else 1
    History(source, rank, counting, spectrum=change == "spectrum", cache=cache).compress("global")
    assert counting.deltas == 4 * 4


def test_sources_without_fingerprints_and_inner_products_of_dense_matrices_are_not_cached(cache: DeltaCache) -> None:
    History(lora_run(), cache=cache).compress("global")
    History(on_disk(full_run()), cache=cache).grams()
    assert not cache.folder.exists()


def test_a_damaged_file_is_computed_again_and_named(cache: DeltaCache) -> None:
    History(on_disk(lora_run()), 1, Counting(), cache=cache).compress("global")
    for path in cache.folder.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    counting = Counting()
    History(on_disk(lora_run()), 1, counting, cache=cache).compress("global")
    assert counting.deltas == 4 * 4
    assert str(cache.folder) in (cache.trouble or "")
    fresh = DeltaCache(cache.folder.parent)
    assert History(on_disk(lora_run()), 1, counting, cache=fresh).components("global")
    assert counting.deltas == 4 * 4
    assert fresh.trouble is None


def test_a_folder_that_cannot_be_written_only_disables_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DeltaCache(tmp_path / "file" / "cache")
    history = History(on_disk(lora_run()), cache=cache)
    assert history.components("global")
    assert str(cache.folder) in (cache.trouble or "")
    assert history.cache_trouble == cache.trouble


def test_the_least_recently_used_are_dropped_above_the_limit(cache: DeltaCache) -> None:
    History(on_disk(lora_run()), cache=cache).compress("global")
    files = sorted(cache.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 4
    os.utime(files[0])
    small = DeltaCache(cache.folder.parent, limit=3 * files[0].stat().st_size)
    small.save("f" * 64, small.load(files[0].stem, ["a", "b", "c", "d"]) or {})
    kept = set(cache.folder.iterdir())
    assert files[0] in kept
    assert files[1] not in kept
    assert sum(path.stat().st_size for path in kept) <= small.limit


def test_other_peoples_files_are_never_touched(tmp_path: Path) -> None:
    strangers = [tmp_path / "model-00001.safetensors", tmp_path / "deltas" / "mine.safetensors"]
    (tmp_path / "deltas").mkdir()
    for path in strangers:
        path.write_bytes(b"0" * 10_000)
    (tmp_path / ".run.old-999999999").mkdir()
    cache = DeltaCache(tmp_path, limit=1)
    History(on_disk(lora_run()), cache=cache).compress("global")
    assert all(path.exists() for path in [*strangers, tmp_path / ".run.old-999999999"])
    assert sorted(cache.folder.iterdir()) == [strangers[1]]


def test_half_written_files_of_dead_processes_are_removed_and_of_living_ones_kept(cache: DeltaCache) -> None:
    cache.folder.mkdir(parents=True)
    dead, alive = (cache.folder / f".{'a' * 64}.safetensors.tmp-{pid}" for pid in (2**22 + 1, os.getppid()))
    for path in (dead, alive):
        path.write_bytes(b"half")
    History(on_disk(lora_run()), cache=cache).compress("global")
    assert alive.exists()
    assert not dead.exists()


def test_another_users_file_is_read_and_not_marked_as_used(cache: DeltaCache, monkeypatch: pytest.MonkeyPatch) -> None:
    History(on_disk(lora_run()), 1, Counting(), cache=cache).compress("global")
    monkeypatch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(PermissionError(13, "not yours")))
    counting = Counting()
    History(on_disk(lora_run()), 1, counting, cache=cache).compress("global")
    assert counting.deltas == 0
    assert cache.trouble is None


def test_a_user_without_a_home_computes_without_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(user: int) -> None:
        raise KeyError(f"uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert CacheOptions().open_cache() is None
    assert CacheOptions(cache=tmp_path).open_cache() is not None

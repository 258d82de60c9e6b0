"""A full disk is one message with the figures, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from next_core import make_applier, open_checkpoints
from next_core.appliers import stream
from next_core.appliers.alpha_sweep import apply_sweep
from next_core.errors import NextCoreError
from next_core.interfaces import CoefficientUpdate, Prediction
from next_core.storage import atomic as storage
from tests.conftest import LoraRun

Usage = namedtuple("Usage", "total used free")
BOTH = pytest.mark.parametrize("applier", ["peft-adapter", "merged-model"])


@pytest.fixture(scope="module")
def run(make_lora_run: Callable[..., LoraRun], tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    return make_lora_run(tmp_path_factory.mktemp("run") / "checkpoints", (0, 10, 20))


@pytest.fixture
def prediction(run: LoraRun) -> Prediction:
    source = open_checkpoints(run.path, backbone=run.base)
    return Prediction(source, 20, 10, updates={n: CoefficientUpdate({20: 1.0, 10: -1.0}) for n in run.deltas[20]})


@BOTH
def test_too_little_space_is_refused_with_the_figures_before_anything_is_written(
    prediction: Prediction, tmp_path: Path, applier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(10**9, 0, 2_500_000))
    out = tmp_path / "deep" / "out"
    with pytest.raises(NextCoreError, match=r"out needs 67\.\d MB but the disk has 2\.5 MB free; nothing was written"):
        make_applier(applier).apply(prediction, out=out)
    with pytest.raises(NextCoreError, match=r"out needs 13\d\.\d MB"):
        apply_sweep(make_applier(applier), prediction, [1, 2], out)
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_disk_that_fills_up_half_way_names_the_file_and_leaves_nothing(
    prediction: Prediction, tmp_path: Path, applier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.write, []

    def filling(descriptor: int, data: Any) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(1)
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(stream.os, "write", filling)
    with pytest.raises(
        NextCoreError, match=r"disk was full while \w+_?model\.safetensors|disk was full while model"
    ) as e:
        make_applier(applier).apply(prediction, out=tmp_path / "out")
    assert "were needed" in str(e.value)
    assert isinstance(e.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []
    written.clear()
    with pytest.raises(NextCoreError, match="disk was full"):
        apply_sweep(make_applier(applier), prediction, [1, 2], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_another_error_of_the_disk_is_not_called_a_full_one(
    prediction: Prediction, tmp_path: Path, applier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, data: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stream.os, "write", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*model\.safetensors"):
        make_applier(applier).apply(prediction, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_in_place_the_shard_that_did_not_fit_stays_as_it_was(
    prediction: Prediction, run: LoraRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(run.base, tmp_path / "target"))
    before = (target / "model.safetensors").read_bytes()

    def full(descriptor: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.os, "write", full)
    with pytest.raises(NextCoreError, match="disk was full"):
        make_applier("merged-model", in_place=True).apply(prediction, out=target)
    assert (target / "model.safetensors").read_bytes() == before
    assert not list(target.glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@BOTH
def test_a_real_disk_that_is_too_small(
    prediction: Prediction, small_disk: Path, applier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NextCoreError, match=r"needs 67\.\d MB but the disk has 0\.1 MB free"):
        make_applier(applier).apply(prediction, out=small_disk / "out")
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 10**12)
    for alphas in ([1.0], [0.5, 1.0, 2.0]):
        (small_disk / "ballast").write_bytes(bytes(48 * 1024))
        with pytest.raises(NextCoreError, match="the disk was full while"):
            apply_sweep(make_applier(applier), prediction, alphas, small_disk / "out")
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]

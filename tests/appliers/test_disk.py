"""A full disk gives one message with the figures, and leaves nothing behind."""

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from next_core import make_applier
from next_core.appliers.folder_applier import apply_sweep
from next_core.appliers.safetensors_writer import TensorWriter
from next_core.errors import NextCoreError
from next_core.interfaces import Prediction
from next_core.storage import atomic
from tests.appliers.conftest import BOTH, secant
from tests.conftest import LoraRun
from tests.errors import raises_kind


@pytest.fixture
def prediction(run: LoraRun) -> Prediction:
    return secant(run)


class FailingFile(io.FileIO):
    """A file that takes a few bytes and then fails."""

    number = 0

    def write(self, data: Any) -> int:
        if self.tell():
            raise OSError(self.number, "as the disk says")
        return super().write(data[:10])


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every new weight file fail with an error number."""
    real = TensorWriter.__init__

    def failing(self: TensorWriter, path: Path, *arguments: Any, **options: Any) -> None:
        real(self, path, *arguments, **options)
        self._file.close()
        self._file = FailingFile(path, "r+")

    def install(number: int) -> None:
        monkeypatch.setattr(FailingFile, "number", number)
        monkeypatch.setattr(TensorWriter, "__init__", failing)

    return install


@BOTH
def test_too_little_space_is_refused(
    prediction: Prediction, tmp_path: Path, applier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 2_500_000)
    out = tmp_path / "deep" / "out"
    with raises_kind("storage-full", out, "67.", "2.5 MB"):
        make_applier(applier).apply(prediction, out=out)
    with raises_kind("storage-full", " 13"):
        apply_sweep(make_applier(applier), prediction, [1, 2], out)
    assert list(tmp_path.iterdir()) == []


@BOTH
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_names_the_file_and_leaves_nothing(
    prediction: Prediction, tmp_path: Path, applier: str, fail_with: Callable[[int], None], number: int
) -> None:
    fail_with(number)
    out = tmp_path / "out"
    for write in (
        lambda: make_applier(applier).apply(prediction, out=out),
        lambda: apply_sweep(make_applier(applier), prediction, [1, 2], out),
    ):
        with pytest.raises(OSError, match="model.safetensors") as caught:
            write()
        assert isinstance(caught.value, NextCoreError) is (number == errno.ENOSPC)
        assert list(tmp_path.iterdir()) == []

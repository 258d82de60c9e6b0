"""A streamed file is what the safetensors library would have written."""

import errno
import fcntl
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from next_core.appliers import safetensors_writer
from next_core.appliers.safetensors_writer import TensorWriter, entry_of
from next_core.errors import NextCoreError
from next_core.storage.manifest import digest_of
from next_core.storage.reading import Entry, read_header
from tests.conftest import noise


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "b": noise("b", 3, 5).bfloat16(),
        "a": noise("a", 7, 2),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.zeros(0, 4),
        "odd": torch.arange(3, dtype=torch.int8),
        "ü": noise("u", 2, 3).t().half(),
        "long": noise("long", 3001, 3),
    }


def streamed(path: Path, tensors: dict[str, Tensor], rows: int = 2) -> TensorWriter:
    with TensorWriter(path, {name: entry_of(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
        for tensor in tensors.values():
            for block in tensor.split(rows) if tensor.ndim else [tensor]:
                writer.write(block)
    return writer


class WithoutDirectWrites(io.FileIO):
    """A file on a file system that takes O_DIRECT and then refuses each direct write."""

    def write(self, data: Any) -> int:
        if fcntl.fcntl(self, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes")
        return super().write(data)


@pytest.mark.parametrize("buffer", [4096, 4 * 2**20])
@pytest.mark.parametrize("file", [io.FileIO, WithoutDirectWrites])
def test_the_library_reads_it(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, file: Any
) -> None:
    monkeypatch.setattr(safetensors_writer, "BUFFER", buffer)
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: file(path, "x"))
    path = tmp_path / "x.safetensors"
    writer = streamed(path, tensors)
    monkeypatch.undo()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert writer.digest == digest_of(path)


def test_in_the_librarys_order_it_is_the_librarys_bytes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "theirs.safetensors")
    assert {name: entry_of(tensor.dtype, tensor.shape) for name, tensor in contiguous.items()} == entries
    streamed(tmp_path / "ours.safetensors", {name: contiguous[name] for name in entries})
    ours, theirs = ((tmp_path / f"{who}.safetensors").read_bytes() for who in ("ours", "theirs"))
    size = sum(tensor.nbytes for tensor in contiguous.values())
    assert ours[-size:] == theirs[-size:]
    assert len(ours) == len(theirs)
    assert int.from_bytes(ours[:8], "little") % 8 == 0


def test_missing_bytes_are_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(NextCoreError, match="header"),
        TensorWriter(tmp_path / "x", {"a": Entry("F32", (2, 2), 16)}) as w,
    ):
        w.write(torch.zeros(1, 2))

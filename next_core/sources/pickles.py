"""Weights in pickles (``.bin``): read only with permission, and never in a way that runs code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.sources.tensor_files import Place, SafetensorsFile, TensorFile

PICKLE = ".bin"


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorFile:
    """Open a file of tensors by its suffix.

    Raises ``CheckpointError`` for a missing or damaged file, and for a pickle unless these are allowed.
    """
    if path.suffix != PICKLE:
        return SafetensorsFile(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run code; convert it to safetensors, or allow it with allow_pickle=True "
            "(--allow-pickle), which reads only tensors from it",
            kind="checkpoint-pickle",
        )
    return PickleFile(path)


class PickleFile(TensorFile):
    """A file of ``torch.save`` with a dict of tensors, memory-mapped by torch's weights-only reader."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or hostile pickle can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise _not_tensors(path, f"is damaged, or contains more than tensors ({reason})") from None
        if not isinstance(loaded, dict):
            raise _not_tensors(path, f"contains a {type(loaded).__name__} instead of a dict of tensors")
        for key, value in loaded.items():
            # A tensor larger than its storage (stride 0) would be allocated by the first computation.
            if (
                not isinstance(key, str)
                or not isinstance(value, Tensor)
                or (value.layout, value.device.type, value.is_quantized) != (torch.strided, "cpu", False)
                or (value.numel() * value.element_size() > value.untyped_storage().nbytes())
            ):
                raise _not_tensors(path, f"contains {key!r}, which is not a plain tensor")
        self._tensors: dict[str, Tensor] = {key: value.detach() for key, value in loaded.items()}
        self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        return self._values(key, None).dtype

    def _values(self, key: str, rows: Place | None) -> Tensor:
        if key not in self._tensors:
            raise self._unknown(key)
        return self._tensors[key] if rows is None else self._tensors[key][rows]


def _not_tensors(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}; restore it, or save the model's weights alone as safetensors", kind="checkpoint-damaged"
    )

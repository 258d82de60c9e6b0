"""Weights in pickles (``.bin``): read only where it was permitted, and never so that they can run code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.sources.tensor_files import SafetensorsFile, TensorFile

PICKLE = ".bin"


def open_tensors(path: Path, allow_pickle: bool = False) -> TensorFile:
    """A file of tensors by its suffix.

    Raises ``CheckpointError`` when it is missing, damaged, or a pickle and these were not permitted.
    """
    if path.suffix != PICKLE:
        return SafetensorsFile(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run code; convert it to safetensors, or allow it with allow_pickle=True "
            "(--allow-pickle): only tensors are then taken from it"
        )
    return PickleFile(path)


class PickleFile(TensorFile):
    """A file of ``torch.save`` that holds a dict of tensors: memory-mapped, and by torch's weights-only reader."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # what a damaged or hostile pickle raises is anybody's guess
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{path} is damaged, or holds more than tensors ({reason}); restore it, or convert it to safetensors"
            ) from None
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path} holds a {type(loaded).__name__} where a dict of tensors is expected")
        for key, value in loaded.items():
            # A tensor larger than what is stored for it (stride 0) would be made real by the first computation.
            if (
                not isinstance(key, str)
                or not isinstance(value, Tensor)
                or (value.layout, value.device.type, value.is_quantized) != (torch.strided, "cpu", False)
                or (value.numel() * value.element_size() > value.untyped_storage().nbytes())
            ):
                raise CheckpointError(f"{path}: {key!r} is no plain tensor; save the model's weights alone")
        self._tensors: dict[str, Tensor] = {key: value.detach() for key, value in loaded.items()}
        self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        return self._values(key, None).dtype

    def _values(self, key: str, rows: slice | None) -> Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor '{key}'")
        return self._tensors[key] if rows is None else self._tensors[key][rows]

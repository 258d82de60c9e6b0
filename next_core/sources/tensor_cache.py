"""A bounded cache of tensors that were read."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

CACHE_BYTES = 256 * 2**20
"""Limit of one cache."""


class TensorCache:
    """The most recently used tensors, up to ``CACHE_BYTES``."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[str, int], tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int]) -> tuple[Tensor, ...] | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def drop(self, key: tuple[str, int]) -> None:
        self._bytes -= sum(tensor.nbytes for tensor in self._values.pop(key, ()))

    def put(self, key: tuple[str, int], value: tuple[Tensor, ...]) -> None:
        self.drop(key)
        self._values[key] = value
        self._bytes += sum(tensor.nbytes for tensor in value)
        while self._bytes > CACHE_BYTES:
            self.drop(next(iter(self._values)))

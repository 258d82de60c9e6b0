"""Blocks of rows, so that memory does not grow with the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence


def row_blocks(shape: Sequence[int], elements: int) -> list[slice]:
    """Return slices of the leading dimension with about ``elements`` values each, at least one row."""
    if not shape:
        return [slice(None)]
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    return [slice(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows)]

"""Blocks of rows, so that memory does not grow with the matrix."""

import math
from collections.abc import Sequence

import torch


def row_blocks(shape: Sequence[int], elements: int) -> list[slice]:
    """Return slices of the leading dimension with about ``elements`` values each, at least one row."""
    if not shape:
        return [slice(None)]
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    return [slice(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows)]


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for the next ones of the same size; elsewhere nothing happens.

    It returns freed memory beyond a threshold to the system, and the next block faults in each page of it again, which
    cost a quarter of a jump. The threshold is twice the largest mapping that was freed, up to 2 * 32 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)

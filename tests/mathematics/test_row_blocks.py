"""Blocks of rows cover a tensor once."""

from __future__ import annotations

import pytest

from next_core.mathematics.row_blocks import row_blocks


@pytest.mark.parametrize("shape", [(7, 3), (1, 100), (5,), (4, 2, 3)])
def test_blocks_of_rows_cover_a_tensor_once(shape: tuple[int, ...]) -> None:
    rows = [row for block in row_blocks(shape, 6) for row in range(block.start, block.stop)]
    assert rows == list(range(shape[0]))


def test_a_scalar_is_one_block() -> None:
    assert row_blocks((), 6) == [slice(None)]

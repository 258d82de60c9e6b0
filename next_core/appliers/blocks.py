"""One parameter of a merged model, block by block: where it stands, plus the jump, rounded to what is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from next_core.appliers.rounding import Rounder
from next_core.appliers.rounding_loss import Landed, Share
from next_core.errors import GuardError
from next_core.interfaces.prediction import BLOCK, Blend, Resolved, merged
from next_core.mathematics.low_rank import LowRank
from next_core.mathematics.row_blocks import row_blocks

Rows = Callable[[slice], Tensor]
_GEMM_BLOCK = 2**20


@dataclass(frozen=True)
class Start:
    """Where a parameter of shape (m, ...) stands: what is on disk, and what was trained beside it.

    ``newest`` gives the stored rows that the jump is added to; ``position`` (m, n) is added to them first: the LoRA
    update so far. ``at`` gives the rows of another step, for a ``Blend``.
    """

    shape: tuple[int, ...]
    newest: Rows
    position: LowRank | Tensor | None = None
    at: Callable[[int | None, slice], Tensor] | None = None


def extended_blocks(
    name: str, start: Start, moved: Resolved | None, rounder: Rounder, landed: Landed
) -> Iterator[Tensor]:
    """The rows of start + moved in the rounder's precision, in order, with what landed of it counted in ``landed``.

    The sums are in fp32, or in fp64 where that is what is stored. Raises ``GuardError`` when a value is not
    finite or beyond the range of the precision.
    """
    jump = _rows_of(moved, start)
    trained = _rows_of(start.position, start)
    low_rank = isinstance(start.position, LowRank) or isinstance(moved, LowRank)
    of_jump, of_update, changed = Share(), Share(), 0
    scratches = _Scratch(), _Scratch()
    for rows in row_blocks(start.shape, _GEMM_BLOCK if low_rank else BLOCK):
        stored = start.newest(rows)
        work = torch.float64 if torch.float64 in (stored.dtype, rounder.dtype) else torch.float32
        before = begun = stored.to(work)
        wanted = update = None
        if trained is not None:
            update = trained(rows, before).to(work)
            begun = before + update
        if jump is not None:
            wanted = jump(rows, begun).to(work)
        total, moved_by = (scratch.like(begun) for scratch in scratches)
        if wanted is not None:
            torch.add(begun, wanted, out=total)
        else:
            total.copy_(begun)
        written = rounder(total)
        if written is total:  # nothing to round: what is given away must not be a scratch
            written = total.clone()
        else:
            total.copy_(written)
        if not math.isfinite(total.sum()) and not bool(torch.isfinite(total).all()):
            raise GuardError(f"'{name}' overflows {rounder.dtype} after the jump")
        if update is not None:
            of_update.add(total - before, update if wanted is None else update + wanted)
        if wanted is not None:
            moved_by.copy_(begun.to(rounder.dtype))
            torch.sub(total, moved_by, out=moved_by)  # from what would be stored without the jump
            of_jump.add(moved_by, wanted)
            changed += int(np.count_nonzero(moved_by.numpy()))  # faster than torch's
        yield written
    landed.elements[name] = math.prod(start.shape)
    if jump is not None:
        landed.jump[name], landed.changed[name] = of_jump, changed
    if trained is not None:
        landed.update[name] = of_update


class _Scratch:
    """Memory used for one block after another: fresh memory each time is page faults each time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, block: Tensor) -> Tensor:
        """A tensor of the block's shape and precision, with anything in it."""
        if self._memory.dtype is not block.dtype or self._memory.numel() < block.numel():
            self._memory = torch.empty(block.numel(), dtype=block.dtype)
        return self._memory[: block.numel()].view(block.shape)


def _rows_of(moved: Resolved | None, start: Start) -> Callable[[slice, Tensor], Tensor] | None:
    """Rows of a weight_delta, given those of the weight it counts from."""
    if moved is None:
        return None
    if isinstance(moved, Blend):
        return _blend_rows(moved, start) if start.at is not None else lambda rows, _: moved.rows(rows)
    whole = merged(moved)
    if isinstance(whole, Tensor):
        return lambda rows, _: whole[rows]
    factors = whole.to(torch.float32)
    return lambda rows, _: factors.left[rows] @ factors.right


def _blend_rows(moved: Blend, start: Start) -> Callable[[slice, Tensor], Tensor]:
    """sum_t weights[t] (W_t - W_T) + matrix straight from the stored rows."""
    matrix = None if moved.matrix is None else moved.matrix.to(torch.float32)
    at, scratch, sums = start.at, _Scratch(), _Scratch()
    assert at is not None

    def rows_of(rows: slice, newest: Tensor) -> Tensor:
        total: Tensor | None = None
        for step, weight in moved.weights.items():
            part = torch.sub(at(step, rows), newest, out=(sums if total is None else scratch).like(newest)).mul_(weight)
            total = part if total is None else total.add_(part)
        if matrix is not None:
            part = (matrix.left[rows] @ matrix.right).to(newest.dtype)
            total = part if total is None else total.add_(part)
        return newest.new_zeros(newest.shape) if total is None else total

    return rows_of

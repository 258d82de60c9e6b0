"""The tensors of a merged model: which are computed, which are copied and from where, and the blocks of a computed one.

A kind of tensor that needs a rule of its own gets it in ``TensorPlan``.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from next_core.appliers.rounding import ParameterLoss, Rounder, RoundingLoss
from next_core.errors import CheckpointError, GuardError, other_model
from next_core.interfaces import CheckpointSource
from next_core.interfaces.checkpoint_source import StoredModel
from next_core.interfaces.weight_delta import BLOCK, LazyDelta, Resolved, merged
from next_core.mathematics.low_rank import LowRank
from next_core.mathematics.row_blocks import keep_freed_memory, row_blocks
from next_core.sources.adapter_source import PeftAdapterSource
from next_core.sources.backbone import use_names
from next_core.sources.hf_model import ModelFiles, architecture_of
from next_core.sources.matrices import matrices_in, stored_name

GEMM_BLOCK = 2**20  # Values in a block of rows where each block is a matrix product, which small blocks slow down


class TensorPlan:
    """How the tensors of a model are made when they are written with the names, shapes and precisions of given files.

    A tensor that the run trained is computed if it is stored as floats of 16 bits or more. All others are copied as
    stored: from the newest checkpoint if that holds them, else from the backbone.
    """

    def __init__(self, source: CheckpointSource, backbone: ModelFiles, step: int | None = None) -> None:
        self._source, self._backbone = source, backbone
        self._checkpoint: StoredModel | None = None
        self._shapes = {parameter.name: parameter.shape for parameter in source.parameters}
        self._trained = set(map(stored_name, self._shapes))
        self.transposed: Collection[str] = ()
        if source.stores_full_weights:
            self._trained |= set(source.skipped)  # norms and biases, which stay as trained
            if source.steps:
                self._checkpoint = source.model(source.steps[-1] if step is None else step)
        elif (built := architecture_of(backbone.folder)) is not None:
            # The factors of a parameter (target_parameters) are those of what is stored, whatever the layer's class.
            modules = source.modules if isinstance(source, PeftAdapterSource) else ()
            as_stored = {module.target for module in modules if module.target != module.name}
            self.transposed = {name for name in self._shapes if built.is_transposed(name)} - as_stored
            self._shapes |= {name: (n, m) for name in self.transposed for m, n in [self._shapes[name]]}
        for head, embedding in source.tied.items():
            backbone.tie(head, embedding)
        use_names(backbone, self._trained)
        more = set(backbone.shapes) - self._trained if source.stores_full_weights else set()
        built = architecture_of(backbone.folder) if more else None
        others = {} if built is None else built.tied
        self._tied = {name: one for name, one in others.items() if name in more and one in self._trained}
        self._tied |= source.tied
        matrices = (name for name in sorted(more - self._tied.keys()) if matrices_in(name, backbone.shapes[name]))
        self.from_backbone = [name for name in matrices if _is_wide_float(backbone.dtype(name))]
        """Matrices of whole models that the run does not store: they are written as the backbone has them."""

    def name(self, key: str) -> str:
        """Return the run's name of a stored tensor: a tied head is the embedding."""
        name = self._backbone.renamed.get(key, key)
        return self._tied.get(name, name)

    def parts(self, key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the run's names and the shapes of the parts of a tensor that move on their own: a stack's matrices."""
        name = self.name(key)
        return {**matrices_in(name, shape)} or {name: shape}

    def computes(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor is computed; otherwise it is copied."""
        return self.name(key) in self._trained and _is_wide_float(dtype) and len(shape) > 0

    def _origin(self, key: str) -> tuple[StoredModel, str]:
        """Return the files that hold the values of a tensor, and its name there."""
        if self._checkpoint is not None and self.name(key) in self._trained:
            return self._checkpoint, self.name(key)
        return self._backbone, self._backbone.renamed.get(key, key)

    def copied(self, key: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield a tensor as stored, in blocks of rows."""
        files, name = self._origin(key)
        return (files.raw(name, rows if shape else None) for rows in row_blocks(shape, GEMM_BLOCK))

    def check(self, into: ModelFiles, moving: Collection[str] = ()) -> None:
        """Raise ``CheckpointError`` for a tensor that cannot be computed, copied or kept in the layout of ``into``.

        ``moving`` are the parameters that the jump moves. In a LoRA run all of them have to move: by training.
        """
        must_move = set(moving) if self._source.stores_full_weights else self._trained
        kept = set()
        for file in into.files:
            for key, shape in file.shapes.items():
                self._check_tensor(into, key, shape, file.dtype(key), must_move)
                kept.add(self.name(key))
        lost = (self._trained | set(map(self.name, self._backbone.shapes))) - kept
        if lost:
            raise other_model(
                f"{into.folder} does not store '{min(lost)}', which would be lost; use a model with the names of "
                "the checkpoints"
            )

    def _check_tensor(
        self, into: ModelFiles, key: str, shape: tuple[int, ...], dtype: torch.dtype, must_move: Collection[str]
    ) -> None:
        parts = self.parts(key, shape)
        if any(part in must_move for part in parts) and not self.computes(key, dtype, shape):
            raise CheckpointError(
                f"'{key}' is stored as {_name(dtype)} in {into.folder}, too coarse for a jump; use a backbone in bf16",
                kind="checkpoint-unsupported-model",
            )
        files, name = self._origin(key)
        differing = (self._shapes[part] for part, size in parts.items() if self._shapes.get(part, size) != size)
        expected = next(differing, files.shapes.get(name))
        if shape != expected:
            raise other_model(
                f"'{key}' is {shape} in {into.folder} but {expected or 'missing'} in {files.folder}; use the model "
                "that this run started from, or a copy of it"
            )
        have = files.dtype(name)
        # Floats are rounded from one precision to another; any other conversion would change the meaning.
        if have != dtype and not (_is_wide_float(dtype) and have.is_floating_point):
            raise CheckpointError(
                f"'{key}' is stored as {_name(dtype)} in {into.folder} but as {_name(have)} in {files.folder}; use a "
                "backbone that stores it as the checkpoints do",
                kind="checkpoint-unsupported-model",
            )


def _is_wide_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def jumped_blocks(
    name: str,
    shape: tuple[int, ...],
    read: Callable[[slice], Tensor],
    trained: LowRank | Tensor | None,
    moved: Resolved | None,
    rounder: Rounder,
    losses: RoundingLoss,
    check: Callable[[slice], object] = lambda rows: None,
) -> Iterator[Tensor]:
    """Yield the rows of a parameter, what ``read`` gives + trained + moved, in order and rounded.

    ``read`` gives stored rows of the newest checkpoint, or of the backbone, to which ``trained`` (m, n) is added first:
    the LoRA update so far. Sums are in fp32, or in fp64 where that is stored. What rounding lost goes into ``losses``.
    Raises ``GuardError`` for values that are not finite or beyond the range of the precision, unless ``check`` raises
    for rows that are stored so.
    """
    trained_rows, moved_rows = _rows_of(trained), _rows_of(moved)
    keep_freed_memory()
    has_product = isinstance(trained, LowRank) or isinstance(moved, LowRank)
    loss = losses.parameters[name] = ParameterLoss(math.prod(shape))
    for rows in row_blocks(shape, GEMM_BLOCK if has_product else BLOCK):
        raw = read(rows)
        work = torch.float64 if torch.float64 in (raw.dtype, rounder.dtype) else torch.float32
        update = jump = None
        start = stored = raw.to(work)
        if trained_rows is not None:
            update = trained_rows(rows, None).to(work)
            start = stored + update
        total = start
        if moved_rows is not None:
            jump = moved_rows(rows, stored if trained is None else None).to(work)
            total = start + jump
        rounded = rounder(total)
        # In place, where the sum is a new tensor and no longer needed: memory traffic is most of the cost here.
        written = total.copy_(rounded) if jump is not None and rounded.dtype is not work else rounded.to(work)
        if update is not None:
            loss.update.add(written - stored, update if jump is None else update + jump)
        if jump is None:
            finite = math.isfinite(written.sum())
        else:
            # The jump moves the value from what would be stored without it.
            before = start if raw.dtype is rounder.dtype and update is None else start.to(rounder.dtype).to(work)
            loss.add_jump(written - before if written is rounded else written.sub_(before), jump)
            # These sums of products are finite only if every value is, which spares three more passes.
            finite = math.isfinite(loss.jump.along + loss.jump.wanted)
        if not finite and not bool(torch.isfinite(rounded).all()):
            check(rows)
            raise GuardError(
                f"'{name}' overflows {_name(rounder.dtype)} after the jump; use a smaller alpha or a float32 backbone",
                kind="numbers-overflow",
            )
        yield rounded


def _rows_of(delta: Resolved | None) -> Callable[[slice, Tensor | None], Tensor] | None:
    """Return how to read rows of a delta; a ``LazyDelta`` takes the rows of W_T where they are known."""
    if delta is None:
        return None
    if isinstance(delta, LazyDelta):
        return replace(delta, matrix=None if delta.matrix is None else delta.matrix.to(torch.float32)).rows
    whole = merged(delta)
    if isinstance(whole, Tensor):
        return lambda rows, _: whole[rows]
    factors = whole.to(torch.float32)
    return lambda rows, _: factors.left[rows] @ factors.right

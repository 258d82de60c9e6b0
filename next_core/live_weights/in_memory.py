"""Jumps in a model that is training: in its own LoRA factors, in a frozen adapter, or in its full weights."""

from typing import Any

import torch
from torch import Tensor

from next_core.errors import BackendError, unsupported
from next_core.interfaces import Applied, Prediction, WeightApplier
from next_core.interfaces.prediction import weight_deltas
from next_core.interfaces.weight_delta import FactorStep
from next_core.live_weights.frozen_adapters import (
    add_frozen_adapter,
    is_peft,
    next_name,
    remove_adapter,
    trained_adapter,
)
from next_core.live_weights.live_model import LiveModel
from next_core.mathematics.low_rank import LowRank, dense
from next_core.sources.adapter_tensors import factor_keys, part_of, shift_keys
from next_core.sources.matrices import place_in_stack, stored_name

BATCH = 2**26
"""Bytes of changed weights that are collected before they are written: a jump of an adapter is a few calls."""


class InMemoryApplied(Applied):
    """A jump in a live model.

    ``kept`` holds all trained weights and the optimizer's moments from before it, ``adapter`` the name of the frozen
    adapter if one was added. ``shift`` is how far the trained weights have moved since, rounding included: past
    checkpoints are moved by it right after the jump, so that later secants measure RL alone.
    """

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self.kept = live.keep()
        self.adapter: str | None = None
        self.shift: dict[str, Tensor] = {}
        self._changed: dict[str, Tensor] = {}

    def whole(self, name: str) -> Tensor:
        """Return a whole weight as it will be after ``write``. All changes of one weight follow each other."""
        if name not in self._changed:
            if sum(value.nbytes for value in self._changed.values()) > BATCH:
                self.write()
            self._changed |= self._live.read(name)
        return self._changed[name]

    def add(self, key: str, target: Tensor, delta: Tensor) -> None:
        """Add ``delta`` to a whole weight or to a view of a part of it, and record the shift under ``key``."""
        old = target.clone()
        target.copy_((old.double() + delta).to(old.dtype))
        self.shift[key] = target.float() - old.float()

    def write(self) -> None:
        """Write what was added so far."""
        if self._changed:
            changed, self._changed = self._changed, {}
            self._live.write(changed)

    def rollback(self) -> None:
        self._live.restore(self.kept)
        if self.adapter is not None:
            self._live.change_adapters(remove_adapter, self.adapter)


class InMemoryApplier(WeightApplier):
    """Changes a live ``torch.nn.Module`` or ``LiveModel`` in place.

    LoRA: coefficients in factor space change the trained adapter's own A and B. Any other update becomes an exact
    frozen adapter ``jump-N``. Its weights are buffers instead of parameters, so that nothing (``disable_adapter``,
    merging, ``set_adapter``) can give them gradients. Full-parameter runs: W += delta, in fp32.
    """

    name = "in-memory"
    writes_folders = False

    @torch.no_grad()
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        live = out if isinstance(out, LiveModel) else LiveModel(out)
        applied = InMemoryApplied(live)
        as_adapter: dict[str, LowRank] = {}
        try:
            # One matrix at a time, since a full-parameter jump is as large as the model; an error undoes all of it.
            for name, moved in weight_deltas(prediction, alpha):
                if isinstance(moved, FactorStep):
                    module = moved.at.module or name.removesuffix(".weight")
                    keys = zip(shift_keys(module), factor_keys(module), (moved.dA, moved.dB), "AB", strict=True)
                    for shift_key, key, delta, side in keys:
                        path = f"{key.removesuffix('.weight')}.{trained_adapter(live.model)}.weight"
                        whole = applied.whole(live.parameter(path, stored_name(path)))
                        part = part_of(side, whole, len(moved.dA), moved.at.expert)
                        _check_shape(path, part, delta)
                        applied.add(shift_key, part, delta)
                elif not is_peft(live.model):
                    delta, index = dense(moved), place_in_stack(name)
                    whole = applied.whole(live.parameter(name, stored_name(name)))
                    part = whole if index is None else whole[index]
                    _check_shape(name, part, delta)
                    applied.add(name, _in_full_precision(name, part), delta)
                else:
                    as_adapter[name] = _as_low_rank(name, moved)
            applied.write()
            if as_adapter:
                applied.adapter = next_name(live.model)  # known before: adding it may fail half-way, or in one process
                live.change_adapters(add_frozen_adapter, applied.adapter, as_adapter)
        except BaseException:
            applied.rollback()
            raise
        return applied


def _in_full_precision(name: str, value: Tensor) -> Tensor:
    if value.dtype not in (torch.float32, torch.float64):
        raise unsupported(
            f"'{name}' is {value.dtype}, whose rounding would lose most of a small jump; load the model in float32, or "
            "train LoRA"
        )
    return value


def _as_low_rank(name: str, delta: LowRank | Tensor) -> LowRank:
    if not isinstance(delta, LowRank):
        raise unsupported(
            f"the jump of '{name}' is a dense matrix, which no adapter can hold; use a predictor with low-rank updates"
        )
    return delta


def _check_shape(path: str, target: Tensor, delta: Tensor) -> None:
    if target.shape != delta.shape:
        raise BackendError(
            f"the live model's '{path}' is {tuple(target.shape)}, the jump {tuple(delta.shape)}; use the checkpoints "
            "of this model",
            kind="checkpoint-other-model",
        )

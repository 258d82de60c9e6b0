"""Jumps in a model that is training: in its own LoRA factors, in a frozen adapter, or in its full weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from next_core.appliers.jump_adapter import adapter_settings, balanced
from next_core.errors import BackendError, describe
from next_core.interfaces import Applied, Prediction, WeightApplier
from next_core.interfaces.prediction import weight_deltas
from next_core.interfaces.weight_delta import FactorStep
from next_core.live_weights.live_model import LiveModel
from next_core.mathematics.low_rank import LowRank, dense
from next_core.process.containment import same_random_states
from next_core.sources.adapter_tensors import factor_keys, part_of, shift_keys
from next_core.sources.layouts import JUMP_PREFIX
from next_core.sources.matrices import place_in_stack, stored_name

FACTORS_INSTEAD = "use a coefficient predictor with space: factors"


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
                applied.adapter = live.change_adapters(add_frozen_adapter, as_adapter)
        except BaseException:
            applied.rollback()
            raise
        return applied


def _in_full_precision(name: str, value: Tensor) -> Tensor:
    if value.dtype not in (torch.float32, torch.float64):
        raise BackendError(
            f"'{name}' is {value.dtype}, whose rounding would lose most of a small jump; load the model in float32, or "
            "train LoRA",
            kind="backend-unsupported",
        )
    return value


def _as_low_rank(name: str, delta: LowRank | Tensor) -> LowRank:
    if not isinstance(delta, LowRank):
        raise BackendError(
            f"the jump of '{name}' is a dense matrix, which no adapter can hold; use a predictor with low-rank updates",
            kind="backend-unsupported",
        )
    return delta


def _check_shape(path: str, target: Tensor, delta: Tensor) -> None:
    if target.shape != delta.shape:
        raise BackendError(
            f"the live model's '{path}' is {tuple(target.shape)}, the jump {tuple(delta.shape)}; use the checkpoints "
            "of this model",
            kind="checkpoint-other-model",
        )


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a PEFT model; peft is not imported."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def trained_adapter(model: Any) -> str:
    """Return the name of the adapter that trains."""
    names = [name for name in _active(model) if not name.startswith(JUMP_PREFIX)]
    if len(names) != 1:
        raise BackendError(
            f"the active adapters to train are {names or 'none'}; activate exactly one", kind="backend-unsupported"
        )
    return names[0]


def jump_adapters(model: Any) -> list[str]:
    """Return the names of a PEFT model's frozen jump adapters, oldest first."""
    names = [name for name in model.peft_config if name.startswith(JUMP_PREFIX)]
    return sorted(names, key=_number)


def _number(adapter: str) -> int:
    return int(adapter.removeprefix(JUMP_PREFIX))


def activate_jumps(model: Any) -> list[str]:
    """Activate and freeze all jump adapters again, as after ``resume_from_checkpoint``. Returns their names."""
    jumps = jump_adapters(model)
    if jumps:
        for name in jumps:
            _freeze(model, name)
        model.base_model.set_adapter([trained_adapter(model), *jumps])
    return jumps


def add_frozen_adapter(model: Any, deltas: Mapping[str, LowRank]) -> str:
    """Add an active frozen adapter whose B A is exactly each delta. Returns its name."""
    from peft import LoraConfig

    trained = model.peft_config[trained_adapter(model)]
    tied = getattr(trained, "ensure_weight_tying", False)
    reason = None
    if "ref" in model.peft_config:
        reason = "its reference policy is an adapter named 'ref', and switching to it deactivates jump adapters"
    elif tied and any(".lora_embedding_A." in name for name, _ in model.named_parameters()):
        reason = "with ensure_weight_tying its head and embedding share factors, and a jump would move the head alone"
    if reason is not None:
        raise BackendError(
            f"this model takes no jump adapter: {reason}; {FACTORS_INSTEAD}, or start from a merged model",
            kind="backend-unsupported",
        )
    name = f"{JUMP_PREFIX}{max(map(_number, jump_adapters(model)), default=0) + 1}"
    settings = adapter_settings(deltas)
    config = LoraConfig(**settings, task_type=trained.task_type, fan_in_fan_out=trained.fan_in_fan_out)
    with same_random_states():  # PEFT draws initial weights, which are overwritten
        model.add_adapter(name, config)
    for parameter, delta in deltas.items():
        if delta.rank == 0:
            continue
        layer = model.base_model.model.get_submodule(parameter.removesuffix(".weight"))
        with torch.no_grad():
            for table, value in zip((layer.lora_A, layer.lora_B), balanced(delta), strict=True):
                table[name].weight.copy_(value)
    activate_jumps(model)
    return name


def add_saved_adapter(model: Any, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Add an active frozen adapter from the config and the tensors of its files."""
    from peft import PeftConfig

    with same_random_states():
        model.add_adapter(name, PeftConfig.from_peft_type(**config))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in tensors.items():
            parameters[f"{key.removesuffix('.weight')}.{name}.weight"].copy_(value)
    activate_jumps(model)


def rehearse_adapter(model: Any) -> None:
    """Add a jump adapter that does nothing, read it as the trainer's checkpoints do, and remove it.

    Raises ``BackendError`` for a model in which every jump in merged space must fail.
    """
    from peft import get_peft_model_state_dict

    try:
        name = add_frozen_adapter(model, _zeros(model, trained_adapter(model)))
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        remove_adapter(model, name)
    except BackendError:
        raise
    except Exception as error:  # PEFT has no class of errors for what it cannot do
        raise BackendError(
            "this model takes no second adapter next to the trained one, which a jump in merged space needs "
            f"({describe(error)}): {FACTORS_INSTEAD}",
            kind="backend-unsupported",
        ) from error


def _zeros(model: Any, adapter: str) -> dict[str, LowRank]:
    """Return a delta of zeros and rank 1 for every matrix that an adapter moves."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        tables = [getattr(layer, side, {}) for side in ("lora_A", "lora_B")]
        if not all(adapter in table for table in tables):
            continue
        # Under ZeRO-3 the tensors are empty between forward passes.
        shapes = [getattr(table[adapter].weight, "ds_shape", table[adapter].weight.shape) for table in tables]
        if len(shapes[0]) != 2:
            continue
        (_, n), (m, _) = shapes
        key = f"{name}[0]" if hasattr(layer, "parameter_name") else f"{name}.weight"
        found[key] = LowRank(torch.zeros(m, 1).double(), torch.zeros(1, n).double())
    return found


def remove_adapter(model: Any, name: str) -> None:
    """Delete a jump adapter; the others stay active."""
    active = [other for other in _active(model) if other != name]
    model.delete_adapter(name)
    model.base_model.set_adapter(active)
    activate_jumps(model)


def _freeze(model: Any, adapter: str) -> None:
    """Turn an adapter's weights into buffers, which no optimizer trains."""
    for layer in model.modules():
        for table in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})):
            if adapter in table and isinstance(table[adapter].weight, nn.Parameter):
                weight = table[adapter].weight.detach()
                del table[adapter].weight
                table[adapter].register_buffer("weight", weight)


def _active(model: Any) -> list[str]:
    return list(model.base_model.active_adapters)

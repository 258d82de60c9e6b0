"""Into a model that is training: its own factors, a frozen adapter beside the trained one, or its full weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from next_core.appliers.jump_adapter import adapter_settings, balanced
from next_core.errors import BackendError
from next_core.interfaces import Applied, Prediction, WeightApplier
from next_core.interfaces.prediction import FactorStep, weight_deltas
from next_core.mathematics.low_rank import LowRank, dense
from next_core.process.containment import same_random_states
from next_core.sources.adapter_source import JUMP_PREFIX, SHIFT_KEYS


class InMemoryApplied(Applied):
    """A jump in a live model. ``shift`` is what past checkpoints move by, so that later secants measure RL alone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.adapter: str | None = None
        self.shift: dict[str, Tensor] = {}

    @torch.no_grad()
    def write(self, key: str, parameter: Tensor, moved: Tensor) -> None:
        """parameter += moved, keeping what was there; the shift is what landed, rounding included."""
        kept = parameter.detach().clone()
        self.kept.append((parameter, kept))
        parameter.copy_((parameter.double() + moved.to(parameter.device)).to(parameter.dtype))
        self.shift[key] = (parameter.float() - kept.float()).cpu()

    @torch.no_grad()
    def rollback(self) -> None:
        for parameter, kept in self.kept:
            parameter.copy_(kept)
        if self.adapter is not None:
            remove_adapter(self._model, self.adapter)


class InMemoryApplier(WeightApplier):
    """Changes a live ``torch.nn.Module`` in place.

    LoRA: a coefficient update in factor space rewrites the trained adapter's own A and B; anything else becomes a
    frozen adapter ``jump-N`` beside it, exact, its weights buffers and not parameters, so that nothing
    (``disable_adapter``, merge and unmerge, ``set_adapter``) can give them gradients. Full-parameter: W += delta, fp32.
    """

    name = "in-memory"
    writes_folders = False

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        applied = InMemoryApplied(out)
        parameters = dict(out.named_parameters())
        beside: dict[str, LowRank] = {}
        try:
            # One matrix at a time: a full-parameter jump is as large as the model. An error on the way undoes it all.
            for name, moved in weight_deltas(prediction, alpha):
                if isinstance(moved, FactorStep):
                    for path, key, delta in _factor_writes(out, name, moved):
                        applied.write(key, _find(parameters, path, delta.shape), delta)
                elif not is_peft(out):
                    delta = dense(moved)
                    applied.write(name, _full_precision(name, _find(parameters, name, delta.shape)), delta)
                elif isinstance(moved, LowRank):
                    beside[name] = moved
                else:
                    raise BackendError(  # noqa: TRY301 - caught to roll back what was written
                        f"a dense jump of '{name}' cannot be put beside a LoRA adapter"
                    )
            if beside:
                applied.adapter = add_frozen_adapter(out, beside)
        except BaseException:
            applied.rollback()
            raise
        return applied


def _factor_writes(model: Any, name: str, moved: FactorStep) -> Iterator[tuple[str, str, Tensor]]:
    """Path in the live model, key in a shift file, weight_delta: of A and of B."""
    adapter, module = trained_adapter(model), name.removesuffix(".weight")
    for side, key, delta in zip("AB", SHIFT_KEYS, (moved.dA, moved.dB), strict=True):
        yield f"base_model.model.{module}.lora_{side}.{adapter}.weight", key.format(name=name), delta


def _full_precision(name: str, parameter: Tensor) -> Tensor:
    if parameter.dtype not in (torch.float32, torch.float64):
        raise BackendError(
            f"'{name}' is {parameter.dtype}: most of a small jump would be lost in its rounding; load the model in "
            "float32, or train LoRA"
        )
    return parameter


def _find(parameters: Mapping[str, Tensor], path: str, shape: tuple[int, ...]) -> Tensor:
    target = parameters.get(path)
    if target is None:
        raise BackendError(f"the live model has no parameter '{path}'; do the checkpoints belong to it?")
    if tuple(target.shape) != tuple(shape):
        raise BackendError(f"the live model's '{path}' is {tuple(target.shape)}, the jump {tuple(shape)}")
    return target


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a PEFT model (without importing peft where it is not)."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def trained_adapter(model: Any) -> str:
    """The name of the adapter that trains."""
    names = [name for name in _active(model) if not name.startswith(JUMP_PREFIX)]
    if len(names) != 1:
        raise BackendError(f"expected one trained adapter, the model has {names or 'none'} active")
    return names[0]


def jump_adapters(model: Any) -> list[str]:
    """The frozen jump adapters of a PEFT model, in the order they were made."""
    names = [name for name in model.peft_config if name.startswith(JUMP_PREFIX)]
    return sorted(names, key=lambda name: int(name.removeprefix(JUMP_PREFIX)))


def activate_jumps(model: Any) -> list[str]:
    """Make every jump adapter active and frozen again, as after ``resume_from_checkpoint``. Returns their names."""
    jumps = jump_adapters(model)
    if jumps:
        for name in jumps:
            _freeze(model, name)
        model.base_model.set_adapter([trained_adapter(model), *jumps])
    return jumps


def add_frozen_adapter(model: Any, moves: Mapping[str, LowRank]) -> str:
    """A new active adapter whose B A is each weight_delta, exactly; frozen. Returns its name."""
    from peft import LoraConfig

    if "ref" in model.peft_config:
        raise BackendError(
            "this run keeps its reference policy in an adapter called 'ref', and switching to it and back would drop "
            "a jump adapter; use a coefficient predictor with space: factors, or start from a merged model"
        )
    numbers = [int(name.removeprefix(JUMP_PREFIX)) for name in jump_adapters(model)]
    name = f"{JUMP_PREFIX}{max(numbers, default=0) + 1}"
    settings = adapter_settings(moves)
    config = LoraConfig(**settings, task_type=model.peft_config[trained_adapter(model)].task_type)
    with same_random_states():  # PEFT draws a start that is overwritten
        model.add_adapter(name, config)
    for module in settings["target_modules"]:
        layer = model.base_model.model.get_submodule(module)
        with torch.no_grad():
            for table, value in zip((layer.lora_A, layer.lora_B), balanced(moves[f"{module}.weight"]), strict=True):
                table[name].weight.copy_(value)
    activate_jumps(model)
    return name


def remove_adapter(model: Any, name: str) -> None:
    """Delete a jump adapter; the others stay active."""
    active = [other for other in _active(model) if other != name]
    model.delete_adapter(name)
    model.base_model.set_adapter(active)
    activate_jumps(model)


def _freeze(model: Any, adapter: str) -> None:
    """Turn an adapter's weights into buffers: what is no parameter can never be trained."""
    for layer in _lora_layers(model):
        for table in (layer.lora_A, layer.lora_B):
            if adapter in table and isinstance(table[adapter].weight, nn.Parameter):
                weight = table[adapter].weight.detach()
                del table[adapter].weight
                table[adapter].register_buffer("weight", weight)


def _lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")]


def _active(model: Any) -> list[str]:
    return list(model.base_model.active_adapters)

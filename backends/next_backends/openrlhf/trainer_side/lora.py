"""LoRA policies: merged weights for vLLM, and frozen jump adapters next to the trained one.

OpenRLHF sends the parameters of a PEFT model under PEFT's names, which vLLM refuses (OpenRLHF issue 1349). We show it
the plain names, with W + scaling B A computed out of place, a part of the model at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from peft.tuners.lora import LoraLayer
from policy import in_parts
from safetensors.torch import load_file

FROZEN = "next_core_frozen_adapters"
AT_ONCE = 2**28  # Bytes of merged weights in memory at a time


def broadcast_to_vllm(actor: Any) -> None:
    """``PolicyModelActor.broadcast_to_vllm``, for LoRA policies with merged weights under plain names."""
    trainer = actor.trainer
    policy = trainer.actor
    if not hasattr(policy.model.module, "peft_config"):
        trainer.broadcast_to_vllm()
        return
    try:
        for part in in_parts(_merged(policy.model.module), AT_ONCE):
            view = SimpleNamespace(named_parameters=lambda part=part: iter(part))
            trainer.actor = SimpleNamespace(model=SimpleNamespace(module=view), is_vlm=getattr(policy, "is_vlm", False))
            trainer.broadcast_to_vllm()
    finally:
        trainer.actor = policy


def freeze_adapters(model: Any, folders: list[Path]) -> None:
    """Let the adapters in ``folders`` (A and B with scaling 1), and no others, act in addition to the trained one.

    They are forward hooks and not parameters, so nothing trains, saves or partitions them.
    """
    for handle in getattr(model, f"{FROZEN}_handles", ()):
        handle.remove()
    layers = _lora_layers(model.get_base_model())
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in (key for key in tensors if key.endswith(".lora_A.weight")):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            like = next(p for n, p in layers[name].named_parameters() if "lora_A" in n)
            A, B = (tensors[key.replace("lora_A", side)].to(like.device, like.dtype) for side in ("lora_A", "lora_B"))
            pairs.setdefault(name, []).append((A, B))

    def adding(own: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        def hook(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            for A, B in own:
                output = output + (args[0].to(A.dtype) @ A.T @ B.T).to(output.dtype)
            return output

        return hook

    handles = [layers[name].register_forward_hook(adding(own)) for name, own in pairs.items()]
    object.__setattr__(model, FROZEN, pairs)  # not torch's own, which would look for parameters
    object.__setattr__(model, f"{FROZEN}_handles", handles)


def _lora_layers(base: Any) -> dict[str, Any]:
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _merged(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of the base model by its own names, adapters merged into copies of their weights."""
    base = model.get_base_model()
    layers = _lora_layers(base)
    frozen: dict[str, Any] = getattr(model, FROZEN, {})
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        owner, found, rest = name.rpartition(".base_layer.")
        if not found:
            yield name, parameter
            continue
        layer = layers[owner]
        needed = [parameter]
        if rest == "weight":
            needed += [value for key, value in layer.named_parameters() if "lora_" in key]
        with deepspeed.zero.GatheredParameters(needed):  # does nothing where ZeRO does not shard weights
            weight = parameter.detach().clone()
            if rest == "weight":
                total = weight.float()
                for adapter in layer.active_adapters:
                    total += layer.get_delta_weight(adapter).float()
                for A, B in frozen.get(owner, ()):
                    total += B.float() @ A.float()
                weight.copy_(total)
        weight.ds_shape = weight.shape  # OpenRLHF asks for it under ZeRO-3
        weight.requires_grad_()
        yield f"{owner}.{rest}", weight

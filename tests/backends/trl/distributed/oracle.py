"""What a process holds, read with the public functions of DeepSpeed and torch alone. Every function is a collective."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

MOMENTS = ("exp_avg", "exp_avg_sq")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3]])


def trained(model: Any) -> dict[str, Any]:
    """Parameters by their names in an unwrapped model."""
    named = model.named_parameters()
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in named if p.requires_grad}


def masters(model: Any) -> dict[str, Tensor]:
    """The fp32 weights that the optimizer steps from."""
    return {name: _master(p) for name, p in trained(model).items()}


def forward_weights(model: Any) -> dict[str, Tensor]:
    """The weights that the next forward pass uses."""
    return {name: _gathered(p) for name, p in trained(model).items()}


def moments(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Adam's moments after a step, by moment and parameter."""
    optimizer = optimizer.optimizer  # accelerate wraps it
    return {f"{key}/{name}": _moment(p, optimizer, key) for name, p in trained(model).items() for key in MOMENTS}


def logits(model: Any) -> Tensor:
    """Logits of fixed tokens. FSDP's root stays gathered after a forward pass without a backward one."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = _copy(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)
    model.train(training)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return found


def jump_adapters(model: Any) -> dict[str, Tensor]:
    """The weights of frozen adapters, which every process holds whole."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: _copy(value) for name, value in named if ".jump-" in name and value.ndim == 2}


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().float().cpu().clone()


def _master(parameter: Any) -> Tensor:
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        return _copy(parameter)
    from deepspeed.utils import safe_get_full_fp32_param

    return _copy(safe_get_full_fp32_param(parameter))


def _moment(parameter: Any, optimizer: Any, key: str) -> Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_optimizer_state

        return _copy(safe_get_full_optimizer_state(parameter, key))
    if not hasattr(parameter, "_hp_mapping"):
        return _copy(optimizer.state[parameter][key])
    # DeepSpeed's own function works only once its moments are linked to the parameters: that is left to the callback.
    whole, part = torch.zeros(parameter.numel()), parameter._hp_mapping
    if part is not None:
        flat = optimizer.optimizer.state[optimizer.single_partition_of_fp32_groups[part.param_group_index]][key]
        here, there = part.lp_fragment_address, part.hp_fragment_address
        whole[here.start : here.start + here.numel] = flat[there.start : there.start + there.numel]
    dist.all_reduce(whole)
    return whole.view(parameter.shape)


def _gathered(parameter: Any) -> Tensor:
    if parameter.numel() == getattr(parameter, "ds_numel", parameter.numel()):
        return _copy(parameter)  # a small one, which ZeRO-3 keeps gathered; what follows would end that
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return _copy(parameter)

"""Imported before TRL: accelerate starts DeepSpeed and FSDP in several processes without a GPU.

It knows both for GPUs only, and with ``use_cpu=True`` it drops ``deepspeed=`` without a word and trains plain DDP.
"""

from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from transformers import training_args

_prepare_backend = PartialState._prepare_backend


def _gloo(state: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
    return _prepare_backend(state, cpu, sagemaker_dp, backend) if cpu else ("gloo", DistributedType.MULTI_GPU)


def _on_the_cpu(state: Any) -> None:
    if getattr(state, "device", None) is None:
        state.device = torch.device("cpu")


PartialState._prepare_backend, PartialState.set_device = _gloo, _on_the_cpu
training_args.is_torch_bf16_gpu_available = lambda: True


def for_deepspeed() -> None:
    """Let it compile nothing, and wait for what it gathers."""
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters

    from tests.backends.openrlhf.cpu.shim.waited_gathers import wait_for_gathers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    wait_for_gathers(partition_parameters)

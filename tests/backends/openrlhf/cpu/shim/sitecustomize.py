"""TEST-ONLY: lets the real OpenRLHF train on a CPU. With this folder on PYTHONPATH every Python of a run reads it.

OpenRLHF names CUDA and NCCL outright. The few places that do are replaced as their modules are imported; no file of
OpenRLHF or vLLM is changed, and nothing here has to do with how next-core drives the trainer.
"""

from typing import Any

from cpu_vllm import GlooBroadcaster, weights_stay_writable  # type: ignore[import-not-found]
from waited_gathers import wait_for_gathers  # type: ignore[import-not-found]
from wrapt import when_imported  # type: ignore[import-not-found]


class CpuDevice(str):
    """The device "cpu" to torch, and the index 0 where it is put into ``f"cuda:{...}"``."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return "0"


@when_imported("torch.cuda")
def no_gpu(torch_cuda: Any) -> None:
    """One device, always current; nothing to wait for."""
    torch_cuda.current_device = lambda: CpuDevice("cpu")
    torch_cuda.set_device = lambda device: None
    torch_cuda.synchronize = lambda device=None: None
    torch_cuda.current_stream = lambda device=None: None


@when_imported("torch.distributed.device_mesh")
def cpu_mesh(device_mesh: Any) -> None:
    real = device_mesh.init_device_mesh

    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return real("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    device_mesh.init_device_mesh = init_device_mesh


@when_imported("openrlhf.utils.distributed_util")
def gloo_for_nccl(distributed_util: Any) -> None:
    distributed_util.stateless_init_process_group = GlooBroadcaster


@when_imported("openrlhf.trainer.ray.vllm_worker_wrap")
def weights_to_the_cpu(vllm_worker_wrap: Any) -> None:
    def update_weight(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
        import torch

        if dtype != self.model_config.dtype:
            raise TypeError(f"{name} is sent as {dtype}, and the engine holds {self.model_config.dtype}")
        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])

    vllm_worker_wrap.WorkerWrap.update_weight = update_weight


when_imported("vllm.model_executor.layers.utils")(weights_stay_writable)
when_imported("deepspeed.runtime.zero.partition_parameters")(wait_for_gathers)

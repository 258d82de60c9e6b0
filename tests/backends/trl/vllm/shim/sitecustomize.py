"""TEST-ONLY: lets the real TRL use vLLM on a CPU. With this folder on PYTHONPATH trainer and server both read it.

TRL sends weights to a server over NCCL only: gloo takes its place on both sides. No file of TRL or vLLM is changed.
"""

from collections.abc import Callable, Iterable
from typing import Any

from wrapt import when_imported  # type: ignore[import-not-found]

from tests.backends.openrlhf.cpu.shim.cpu_vllm import GlooBroadcaster, weights_stay_writable

when_imported("vllm.model_executor.layers.utils")(weights_stay_writable)


@when_imported("vllm.distributed.weight_transfer.nccl_common")
def trainer_and_server_meet_over_gloo(nccl_common: Any) -> None:
    nccl_common.torch.accelerator.current_device_index = lambda: 0
    nccl_common.stateless_init_process_group = GlooBroadcaster


@when_imported("vllm.distributed.weight_transfer.packed_tensor")
def weights_are_sent_one_by_one(packed_tensor: Any) -> None:
    from torch import empty

    def send(iterator: Iterable[Any], group: Any, src: int, post_iter_func: Callable[[Any], Any]) -> None:
        for item in iterator:
            group.broadcast(post_iter_func(item).detach(), src)

    def receive(iterator: Iterable[Any], group: Any, src: int, post_unpack_func: Callable[..., Any], **_: Any) -> None:
        for name, (shape, dtype) in iterator:
            weight = empty(tuple(shape), dtype=dtype)
            group.broadcast(weight, src)
            post_unpack_func([(name, weight)])

    packed_tensor.packed_nccl_broadcast_producer, packed_tensor.packed_nccl_broadcast_consumer = send, receive


@when_imported("trl.generation.vllm_client")
def trainers_connect_once(client: Any) -> None:
    """TRL refuses other devices than CUDA; all trainers of a process share one client."""
    connect = client.VLLMClient.init_communicator
    client.VLLMClient.init_communicator = lambda self, device: self.communicator or connect(self, "cuda")

"""vLLM on a CPU: weights that can be replaced, and a way to send them."""

from typing import Any


class GlooBroadcaster:
    """What trainers use of vLLM's PyNcclCommunicator: ``broadcast`` from one rank, in place on the others."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, device: object = None) -> None:
        from datetime import timedelta

        from torch import distributed

        store = distributed.TCPStore(host, port, world_size, is_master=rank == 0)  # type: ignore[attr-defined]
        self.group: Any = distributed.ProcessGroupGloo(store, rank, world_size, timedelta(minutes=10))

    def broadcast(self, tensor: Any, src: int, stream: object = None) -> None:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([tensor.contiguous()], options).wait()


def weights_stay_writable(vllm_layers: Any) -> None:
    """On a CPU vLLM repacks each matrix and drops the original, so that no new weights could be loaded into it."""

    def keep(layer: Any, remove_weight: bool) -> None:
        from torch.nn import functional

        layer.cpu_linear = functional.linear

    vllm_layers.dispatch_cpu_unquantized_gemm = keep

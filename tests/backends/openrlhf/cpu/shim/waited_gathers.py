"""DeepSpeed's gathers of weights over gloo."""

from collections.abc import Sequence
from typing import Any


def wait_for_gathers(partition_parameters: Any) -> None:
    """DeepSpeed (0.19) starts the gathers of several weights and waits only for the last one.

    NCCL finishes them in order. Gloo does not: what arrives late overwrites the values that were loaded into the
    gathered weight in the meantime, such as a base model's, with uninitialized memory.
    """
    init = partition_parameters.Init
    gather = init._allgather_params_coalesced

    def one_by_one(self: Any, params: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        for param in params:
            gather(self, [param], *args, **kwargs)

    init._allgather_params_coalesced = one_by_one

"""A policy that FSDP2 shards: its weights in and out, and its optimizer's steps. Runs in verl's actor workers."""

import contextlib
from collections.abc import Iterator
from typing import Any

from likelihood import right_answers
from policy import Policy
from torch import Tensor
from verl.utils.device import get_device_name

from next_backends.sharding import trained_weights
from next_core.errors import unsupported
from next_core.live_weights.processes import everywhere


def on_policy(worker: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the worker's policy. All ranks call this; rank 0 acts, and all get its answer or error."""
    actor = next(part.actor for part in worker.worker_dict.values() if getattr(part, "actor", None) is not None)
    if not hasattr(actor, "next_core"):
        actor.next_core = FsdpPolicy(actor.engine)
    with _on_device(actor.engine):
        return actor.next_core.lead(method, *arguments)


@contextlib.contextmanager
def _on_device(engine: Any) -> Iterator[None]:
    """Bring offloaded weights and moments to the GPU meanwhile."""
    if not (engine.is_param_offload_enabled or engine.is_optimizer_offload_enabled):
        yield
        return
    engine.to(get_device_name(), grad=False)
    try:
        yield
    finally:
        engine.to("cpu", grad=False)


class FsdpPolicy(Policy):  # type: ignore[misc]
    """One rank's part of the policy."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        super().__init__(engine.module, lambda processes: trained_weights(engine.module, engine.optimizer, processes))

    def prepare_load(self, adapters: list[str], schedule: int) -> None:
        if adapters:
            raise unsupported("verl's engines take no frozen adapters; jump in factor space")

    @everywhere
    def likelihood(self, pairs: list[list[str]]) -> float:
        module = self.engine.module

        def forward(ids: Tensor, **inputs: Any) -> Any:
            return module(input_ids=ids, use_cache=False, **inputs)

        found: float = right_answers(forward, module, self.engine.model_config.tokenizer, pairs)
        return found

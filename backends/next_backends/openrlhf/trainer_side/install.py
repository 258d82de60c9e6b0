"""Puts the hooks into OpenRLHF's Ray classes before they are shipped to their workers; none of its files changes.

There is no callback API. Ray sends the classes ``modified_class`` by value, so changing these in the process that
starts the run is enough, on every node.
"""

from __future__ import annotations

import importlib
from typing import Any

import controller
import likelihood
import lora
import policy
import ray.cloudpickle

USED = {
    "openrlhf.trainer.ppo_trainer:PPOTrainer": (
        "init_checkpoint_states",
        "save_logs_and_checkpoints",
        "broadcast_to_vllm",
        "get_max_steps",
    ),
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor": ("broadcast_to_vllm", "reload_states", "offload_states"),
}
"""What is replaced or called, by class."""


def install(settings: dict[str, Any]) -> None:
    """``settings["hooks"]`` names them: "lora" sends merged weights to vLLM, "control" makes the run pause and obey.

    Raises ``RuntimeError`` when this OpenRLHF lacks a name that is used.
    """
    trainer, actor = (_remote_class(place, names) for place, names in USED.items())
    pickling: Any = ray.cloudpickle
    for module in (controller, likelihood, lora, policy):
        pickling.register_pickle_by_value(module)
    if "lora" in settings["hooks"]:
        actor.broadcast_to_vllm = lora.broadcast_to_vllm
    if "control" in settings["hooks"]:
        controller.take_over(trainer, settings["control"])


def _remote_class(place: str, names: tuple[str, ...]) -> Any:
    module, _, name = place.partition(":")
    remote = getattr(importlib.import_module(module), name, None)
    found = getattr(getattr(remote, "__ray_metadata__", None), "modified_class", None)
    lacks = [method for method in names if not hasattr(found, method)]
    if found is None or lacks:
        raise RuntimeError(
            f"this OpenRLHF has no {place}{'.' + lacks[0] if found is not None else ''}, which next-core hooks into; "
            "install openrlhf==0.11.2"
        )
    return found

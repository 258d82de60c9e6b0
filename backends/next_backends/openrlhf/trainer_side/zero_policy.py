"""A policy that DeepSpeed trains: fp32 masters, next to a model in half precision. Runs in ``PolicyModelActor``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from likelihood import right_answers
from lora import freeze_adapters
from policy import Policy
from torch import Tensor

from next_backends.sharding import ZeroWeights
from next_core.live_weights.processes import everywhere


def on_policy(actor: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the actor's ``Policy``. All ranks call this; rank 0 acts, and all get its answer or error."""
    if not hasattr(actor, "next_core"):
        actor.next_core = ZeroPolicy(actor)
    return actor.next_core.lead(method, *arguments)


def saving_steps(save_checkpoint: Any) -> Any:
    """Return ``PolicyModelActor.save_checkpoint`` as one that also saves the state of step scaling.

    That comes first: a state counts once DeepSpeed's files are there, so no run resumes from one without it.
    """

    def save(actor: Any, tag: str, *args: Any, **kwargs: Any) -> None:
        if getattr(actor, "next_core", None) is not None and actor.next_core.steps is not None:
            on_policy(actor, "save_steps", str(Path(actor.strategy.args.ckpt.path) / "_actor" / tag))
        save_checkpoint(actor, tag, *args, **kwargs)

    return save


class ZeroPolicy(Policy):  # type: ignore[misc]
    """One rank's part of the policy. The masters are read, and both are written."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        model = actor.actor.model.module
        super().__init__(model, lambda _: ZeroWeights(model, actor.actor_optim))

    def prepare_load(self, adapters: list[str], schedule: int) -> None:
        for _ in range(schedule):
            self.actor.actor_scheduler.step()
        if hasattr(self.model, "peft_config"):
            freeze_adapters(self.model, [Path(path) for path in adapters])

    def holds(self, name: str, value: Tensor) -> bool:
        parameter = self.weights.parameters[name]
        with deepspeed.zero.GatheredParameters([parameter]):
            half = torch.equal(parameter.data, value.to(parameter.data))
        return super().holds(name, value) and half

    @everywhere
    def likelihood(self, pairs: list[list[str]]) -> float:
        found: float = right_answers(self.actor.actor.model, self.model, self.actor.tokenizer, pairs)
        return found

"""What a schedule and the trainer's arguments must have in common."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from next_core.errors import BackendError, ConfigError
from next_core.run_config import Guards, Schedule

SHARDED = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM", "XLA": "TorchXLA"}
"""What accelerate calls the ways to train in which a process does not hold the weights as they are, and their names."""


def check_arguments(schedule: Schedule, guards: Guards, total: int, args: Any, several: bool = False) -> None:
    """Raise ``ConfigError`` or ``BackendError`` before training for what would go wrong in it.

    ``several``: whether more than one process will do.

    TRL generates once every ``steps_per_generation * num_iterations`` micro-batches; weights that change in between
    would train on roll-outs, and on log-probabilities, of weights that are gone.
    """
    kind = args.distributed_state.distributed_type.value
    if kind in SHARDED or args.deepspeed or args.fsdp:
        name = SHARDED.get(kind) or ("DeepSpeed" if args.deepspeed else "FSDP")
        raise BackendError(
            f"jumps are not made under {name}, which keeps the weights in a form of its own: launch with plain data "
            "parallelism (torchrun, or accelerate launch --multi_gpu), or use the backend openrlhf for DeepSpeed"
        )
    if args.world_size > 1 and not several:
        raise BackendError(
            f"{args.world_size} processes: a config trains in one; use PredictExtendCallback in a script of your own, "
            "started with torchrun or accelerate launch"
        )
    schedule.check(total)
    guards.check(schedule)
    unit = steps_of_a_generation(args)
    for step in schedule.attempt_steps(total):
        for change, what in ((step, "observe and jump_every"), (step + (guards.recovery or 0), "guards.recovery")):
            if change % unit:
                raise ConfigError(
                    f"weights would change after step {change}, inside a generation that serves {unit} steps; make "
                    f"{what} multiples of {unit}"
                )


def steps_of_a_generation(args: Any) -> int:
    """Every so many steps no roll-outs are left over, and weights may change, or training end and be resumed."""
    reuse = int(args.steps_per_generation * args.num_iterations)
    return reuse // math.gcd(reuse, int(args.gradient_accumulation_steps))


def check_whole(model: nn.Module) -> None:
    """Raise ``BackendError`` where a process holds only a shard of a parameter."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise BackendError(
                f"'{name}' is sharded over the processes: jumps need every process to hold the whole model (plain data "
                "parallelism); load it without tp_plan or a device mesh"
            )

"""Checks of a schedule against the trainer's arguments, before training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from next_core.errors import BackendError, ConfigError
from next_core.predictor import Predictor, TrajectoryPredictor
from next_core.run_config import Guards, Schedule

SHARDED = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM", "XLA": "TorchXLA"}
"""Distributed types, as accelerate names them, in which no process holds the whole weights, with their names."""


def check_arguments(
    predictor: Predictor, schedule: Schedule, guards: Guards, total: int, args: Any, several: bool = False
) -> None:
    """Raise ``ConfigError`` or ``BackendError`` for arguments under which the predictor's changes would go wrong.

    ``several`` allows more than one process.

    TRL generates once every ``steps_per_generation * num_iterations`` micro-batches; after a jump in between, training
    would go on with roll-outs and log-probabilities of the weights from before it.
    """
    kind = args.distributed_state.distributed_type.value
    if kind in SHARDED or args.deepspeed or args.fsdp:
        name = SHARDED.get(kind) or ("DeepSpeed" if args.deepspeed else "FSDP")
        raise BackendError(
            f"neither jumps nor step scaling are supported under {name}, which shards the weights: launch with plain "
            "data parallelism (torchrun, or accelerate launch --multi_gpu), or use the backend openrlhf for DeepSpeed",
            kind="backend-unsupported",
        )
    if args.world_size > 1 and not several:
        raise BackendError(
            f"{args.world_size} processes: a config trains in one; use PredictExtendCallback in your own script, "
            "started with torchrun or accelerate launch",
            kind="backend-unsupported",
        )
    if not isinstance(predictor, TrajectoryPredictor):
        return
    schedule.check(total)
    guards.check(schedule)
    unit = steps_of_a_generation(args)
    for step in schedule.attempt_steps(total):
        for change, what in ((step, "observe and jump_every"), (step + (guards.recovery or 0), "guards.recovery")):
            if change % unit:
                raise ConfigError(
                    f"weights would change after step {change}, inside a generation that serves {unit} steps; make "
                    f"{what} multiples of {unit}",
                    kind="config-schedule",
                )


def check_best_model(args: Any, schedule: Schedule, predictor: Predictor, lora: bool) -> None:
    """Raise ``ConfigError`` if TRL's ``load_best_model_at_end`` would undo a part of what jumps and the mean did.

    It loads the trained weights of an earlier step, which contain the jumps of full weights and of factors until then.
    """
    undone = None
    if schedule.average is not None:
        undone = f"the mean of the last checkpoints (average: {schedule.average})"
    elif lora and isinstance(predictor, TrajectoryPredictor) and predictor.space != "factors":
        undone = (
            "the training since, but not the jumps next to the trained adapter (with space: factors there are none)"
        )
    if args.load_best_model_at_end and undone is not None:
        raise ConfigError(
            f"load_best_model_at_end would undo {undone}: set it to False, or omit the other",
            kind="config-contradiction",
        )


def steps_of_a_generation(args: Any) -> int:
    """Return how many RL steps one generation serves: only between generations may weights change or training end.

    1 for a trainer that does not generate.
    """
    reuse = int(getattr(args, "steps_per_generation", None) or 1) * int(getattr(args, "num_iterations", 1))
    return reuse // math.gcd(reuse, int(args.gradient_accumulation_steps))


def check_whole(model: nn.Module) -> None:
    """Raise ``BackendError`` if this process holds only a shard of a parameter."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise BackendError(
                f"'{name}' is sharded over the processes: jumps need every process to hold the whole model (plain data "
                "parallelism); load it without tp_plan or a device mesh",
                kind="backend-unsupported",
            )


def check_precision(model: nn.Module, lora: bool) -> str | None:
    """Refuse full parameters in half precision; return a warning of an adapter in it, as TRL makes it for 4-bit models.

    Raises ``ConfigError``.
    """
    trained = ((name, p.dtype) for name, p in model.named_parameters() if p.requires_grad)
    low = next(((name, dtype) for name, dtype in trained if dtype not in (torch.float32, torch.float64)), None)
    if low is None:
        return None
    if not lora:
        raise ConfigError(
            f"'{low[0]}' trains in {low[1]}: most of a small update would be lost in its rounding; "
            "load the model in float32 (bf16 autocast is fine), or train LoRA",
            kind="backend-unsupported",
        )
    return (
        f"'{low[0]}' trains in {low[1]}: updates smaller than its rounding are lost, with or without next-core; "
        "cast the adapter's parameters to float32 before training"
    )

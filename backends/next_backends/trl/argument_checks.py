"""Checks of a schedule against the trainer's arguments, before training."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from next_backends.sharding import sharded_by_dtensor
from next_core.errors import ConfigError, contradiction, unsupported
from next_core.live_weights.frozen_adapters import FACTORS_INSTEAD, is_peft
from next_core.predictor import Predictor, TrajectoryPredictor
from next_core.run_config import Guards, Schedule

UNREACHABLE = {"MEGATRON_LM": "Megatron-LM", "XLA": "TorchXLA"}
"""Distributed types, as accelerate names them, whose weights we cannot reach, with their names."""


def check_arguments(
    predictor: Predictor, schedule: Schedule, guards: Guards, total: int, args: Any, several: bool = False
) -> None:
    """Raise ``ConfigError`` or ``BackendError`` for arguments under which the predictor's changes would go wrong.

    ``several`` allows more than one process.

    TRL generates once every ``steps_per_generation * num_iterations`` micro-batches; after a jump in between, training
    would go on with roll-outs and log-probabilities of the weights from before it.
    """
    name = UNREACHABLE.get(args.distributed_state.distributed_type.value)
    if name is not None:
        raise unsupported(
            f"neither jumps nor step scaling are supported under {name}; train with plain data parallelism, DeepSpeed "
            "ZeRO or FSDP2"
        )
    if (args.world_size > 1 or args.deepspeed or args.fsdp) and not several:
        raise unsupported(
            f"{args.world_size} processes, or DeepSpeed or FSDP: a config trains in one, without them; use "
            "PredictExtendCallback in your own script, started with torchrun or accelerate launch"
        )
    jumps = isinstance(predictor, TrajectoryPredictor)
    if getattr(args, "sync_ref_model", False) and (not jumps or guards.recovery is not None):
        raise contradiction(
            "sync_ref_model copies weights into the reference policy, where they stay when a collapse or a jump is "
            "undone later; set it to False"
        )
    if not jumps:
        return
    early = next((name for name in ("max_staleness", "async_prefetch") if getattr(args, name, None)), None)
    if early is not None:
        raise unsupported(
            f"this trainer generates while it trains ({early}: {getattr(args, early)}): after a jump it would go on "
            "with roll-outs of the weights from before it; use predictor='auto', which makes no jumps"
        )
    reuse = batches_of_a_generation(args)
    unit = reuse // math.gcd(reuse, int(args.gradient_accumulation_steps))
    for step in schedule.attempt_steps(total):
        for change, what in ((step, "observe and jump_every"), (step + (guards.recovery or 0), "guards.recovery")):
            if change % unit:
                raise ConfigError(
                    f"weights would change after step {change}, inside a generation that serves {unit} steps; make "
                    f"{what} multiples of {unit}",
                    kind="config-schedule",
                )


def check_jump_adapters(args: Any, predictor: Predictor, model: Any) -> None:
    """Raise ``ConfigError`` or ``BackendError`` where the trainer would not keep frozen jump adapters or not send them.

    ``load_best_model_at_end`` loads the trained weights of an evaluated step. They contain the jumps in full weights
    and in factors made until then, and at the last step the mean, but frozen jump adapters stay as they are at the end.
    """
    if not is_peft(model) or not isinstance(predictor, TrajectoryPredictor) or predictor.space == "factors":
        return
    problem = None
    if getattr(args, "teacher_model_kind", None) == "ema":
        problem = "the trainer switches to its teacher's adapter and back at each step, which deactivates jump adapters"
    elif hasattr(model, "vllm_engine") or getattr(args, "vllm_lora_sync", False):  # Unsloth; axolotl
        problem = "vLLM gets the trained adapter alone, and would generate without the jump adapters"
    if problem is not None:
        raise unsupported(f"{problem}: {FACTORS_INSTEAD}")
    if args.load_best_model_at_end:
        raise contradiction(
            "load_best_model_at_end would undo training, but not the jumps next to the trained adapter: set it to "
            "False, or the predictor's space to factors, which makes none"
        )


def batches_of_a_generation(args: Any) -> int:
    """Return how many micro-batches one generation serves: only between generations may weights change or training end.

    1 for a trainer that does not generate.
    """
    return int(getattr(args, "steps_per_generation", None) or 1) * int(getattr(args, "num_iterations", 1))


def check_reachable(model: nn.Module) -> None:
    """Raise ``BackendError`` if the weights are sharded in a way that we cannot read and write."""
    sharded_by_dtensor(model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise unsupported(
            "the weights are sharded by FSDP version 1; set fsdp_version to 2 (`version` in the trainer's fsdp_config)"
        )


def check_precision(trained: Sequence[torch.dtype], lora: bool) -> str | None:
    """Refuse full parameters in half precision; return a warning of an adapter in it, as TRL makes it for 4-bit models.

    ``trained`` are the precisions that the optimizer steps in: under DeepSpeed those of its fp32 masters. Raises
    ``ConfigError``.
    """
    low = next((dtype for dtype in trained if dtype not in (torch.float32, torch.float64)), None)
    if low is None:
        return None
    if not lora:
        raise ConfigError(
            f"the model trains in {low}: most of a small update would be lost in its rounding; "
            "load the model in float32 (bf16 autocast is fine), or train LoRA",
            kind="backend-unsupported",
        )
    return (
        f"the adapter trains in {low}: updates smaller than its rounding are lost, with or without next-core; "
        "cast the adapter's parameters to float32 before training"
    )

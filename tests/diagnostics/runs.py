"""Runs whose geometry is known: straight lines and random walks, dense and LoRA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.history.history import History
from next_core.interfaces import CheckpointSource
from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors
from tests.predictors.trajectories import dense_run, noise, still

FIFTEEN = tuple(range(10, 160, 10))


def history(source: CheckpointSource) -> History:
    return History(source, 1, ExactCompressor(), spectrum=True)


def name(layer: int, kind: str = "q_proj") -> str:
    return f"model.layers.{layer}.self_attn.{kind}.weight"


def straight(steps: Sequence[int] = FIFTEEN) -> MemorySource:
    """Exactly linear in t, of rank 1; one matrix, and one that never moves."""
    direction = torch.outer(noise(1, 7), noise(2, 5))
    return dense_run({name(0): lambda t: t * direction, name(1): lambda t: still()(t)}, steps)


def walks(count: int, steps: Sequence[int] = FIFTEEN, m: int = 9, n: int = 6, seed: int = 0) -> MemorySource:
    """``count`` matrices, each an isotropic random walk of its own."""
    every = min(b - a for a, b in zip((0, *steps), steps, strict=False))

    def path(index: int) -> Tensor:
        moved = noise(seed + index, max(steps) // every, m, n).cumsum(0)
        return torch.cat([torch.zeros(1, m, n, dtype=torch.float64), moved])

    paths = [path(index) for index in range(count)]
    checkpoints = {t: {name(i): paths[i][t // every] for i in range(count)} for t in steps}
    return MemorySource(checkpoints, {name(i): torch.zeros(m, n, dtype=torch.float64) for i in range(count)})


def lora_walks(count: int, steps: Sequence[int] = (0, *FIFTEEN), m: int = 24, n: int = 20, r: int = 4) -> MemorySource:
    """``count`` LoRA matrices whose factors walk at random, from a fresh adapter with B = 0."""
    moments = range(len(steps))
    A = [
        torch.cat([noise(3 * i, 1, r, n), 0.05 * noise(3 * i + 1, len(steps) - 1, r, n)]).cumsum(0)
        for i in range(count)
    ]
    B = [
        torch.cat([torch.zeros(1, m, r), 0.05 * noise(3 * i + 2, len(steps) - 1, m, r)]).cumsum(0) for i in range(count)
    ]
    return MemorySource(
        {steps[t]: {name(i): LoraFactors(A[i][t], B[i][t], 2.0) for i in range(count)} for t in moments}
    )

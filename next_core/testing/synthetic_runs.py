"""Tiny seeded runs, in memory or on disk: they drift, bend and are noisy, and one matrix never moves."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from next_core.sources.memory import MemorySource
from next_core.types import LoraFactors

SHAPES: Mapping[str, tuple[int, int]] = {
    "model.layers.0.q_proj.weight": (6, 5),
    "model.layers.0.up_proj.weight": (8, 5),
    "model.layers.1.q_proj.weight": (6, 5),
    "model.layers.1.down_proj.weight": (5, 8),
    "model.layers.1.k_proj.weight": (4, 5),
}
FROZEN = "model.layers.1.k_proj.weight"  # The matrix that never moves
RANK, SCALING = 3, 2.0
STEPS = tuple(range(5, 55, 5))
CURVATURE, NOISE = 0.3, 0.02

Weight = LoraFactors | Tensor


class SyntheticRun(MemorySource):
    """A run in memory. Its step 0, where it was kept, can be read but is not among ``steps``, as on disk."""

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step in super().steps if step > 0)

    @property
    def weights(self) -> Mapping[int, Mapping[str, Weight]]:
        """The weights of every kept step, step 0 included."""
        return self._checkpoints

    def only(self, steps: Sequence[int]) -> SyntheticRun:
        return SyntheticRun({step: self._checkpoints[step] for step in steps}, self._backbone, self._metrics)

    def mapped(self, change: Callable[[Any], Weight], names: Sequence[str] = tuple(SHAPES)) -> SyntheticRun:
        """Return the run with every stored value changed, its matrices in the order of ``names``."""
        changed = {step: {name: change(at[name]) for name in names} for step, at in self._checkpoints.items()}
        return SyntheticRun(changed, self._backbone, self._metrics)

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor under a unique name; the tensors are not copies."""
        found = {f"backbone/{name}": value for name, value in self._backbone.items()}
        for step, at in self._checkpoints.items():
            for name, value in at.items():
                parts = {"A": value.A, "B": value.B} if isinstance(value, LoraFactors) else {"W": value}
                found |= {f"{step}/{name}/{part}": tensor for part, tensor in parts.items()}
        return found


def lora_run(steps: Sequence[int] = STEPS, *, seed: int = 0, moves: bool = True) -> SyntheticRun:
    """Return LoRA checkpoints, fp32: A = A_0 + s a / 4, B = s b + 0.3 s^2 c, plus noise; s = step / last step.

    Step 0 is kept; without ``moves`` no matrix moves. The metrics ``reward`` and ``accuracy`` rise.
    """

    def at(name: str, step: int) -> LoraFactors:
        (m, n), s = SHAPES[name], step / steps[-1] if moves and name != FROZEN else 0.0
        A_0, a, A_noise = (_gauss(seed, name, what, RANK, n) for what in ("A", "a", f"A{step}"))
        b, c, B_noise = (_gauss(seed, name, what, m, RANK) for what in ("b", "c", f"B{step}"))
        A = A_0 + s / 4 * a + (s > 0) * NOISE * A_noise
        B = s * b + CURVATURE * s**2 * c + (s > 0) * NOISE * B_noise
        return LoraFactors(A.float(), B.float(), SCALING)

    return SyntheticRun({t: {name: at(name, t) for name in SHAPES} for t in (0, *steps)}, None, _metrics(steps))


def dense_run(
    steps: Sequence[int] = STEPS,
    *,
    seed: int = 0,
    curvature: float = CURVATURE,
    noise: float = NOISE,
    moves: bool = True,
) -> SyntheticRun:
    """Return full-parameter checkpoints, fp32: W = W_0 + s D + curvature s^2 E plus noise; s = step / last step."""
    backbone = {name: _gauss(seed, name, "W", *shape).float() for name, shape in SHAPES.items()}

    def at(name: str, step: int) -> Tensor:
        s = step / steps[-1] if moves and name != FROZEN else 0.0
        D, E, error = (_gauss(seed, name, what, *SHAPES[name]) for what in ("D", "E", f"W{step}"))
        return (backbone[name] + s * D + curvature * s**2 * E + (s > 0) * noise * error).float()

    return SyntheticRun({t: {name: at(name, t) for name in SHAPES} for t in steps}, backbone, _metrics(steps))


def write_lora_run(folder: str | Path, run: SyntheticRun | None = None) -> SyntheticRun:
    """Write PEFT adapters, one ``checkpoint-N`` per kept step, with the trainer's log. Returns the run.

    All factors of ``run`` need the rank and scaling that those of ``lora_run`` have.
    """
    run = run or lora_run()
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in SHAPES})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": int(SCALING * RANK)}
    for step, at in run.weights.items():
        target = Path(folder) / f"checkpoint-{step}"
        target.mkdir(parents=True)
        (target / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules}))
        tensors: dict[str, Tensor] = {}
        for name, value in at.items():
            assert isinstance(value, LoraFactors)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": value.A, f"{module}.lora_B.weight": value.B}
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        logged = [{"step": past, **run.metrics(past)} for past in run.steps if past <= step]
        (target / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logged}))
    return run


def _metrics(steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return metrics logged at each checkpoint; they rise, though not quite evenly."""
    rise = {step: step / steps[-1] + 0.01 * (-1) ** index for index, step in enumerate(steps)}
    return {step: {"reward": 0.2 + 0.5 * at, "accuracy": 0.3 + 0.4 * at} for step, at in rise.items()}


@functools.cache
def _gauss(seed: int, name: str, what: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{what}".encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

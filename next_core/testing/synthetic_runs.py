"""Tiny seeded runs, in memory or on disk: they drift, bend and are noisy, and one matrix never moves."""

from __future__ import annotations

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
FROZEN = "model.layers.1.k_proj.weight"
"""The matrix that never moves."""
RANK = 3
SCALING = 2.0

Weight = LoraFactors | Tensor


class SyntheticRun(MemorySource):
    """A run in memory. Its step 0, where it was kept, can be read but is not among ``steps``, as on disk."""

    def __init__(
        self,
        checkpoints: Mapping[int, Mapping[str, Weight]],
        backbone: Mapping[str, Tensor] | None = None,
        metrics: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__(checkpoints, backbone, metrics)
        self._given = backbone, metrics

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step in super().steps if step > 0)

    @property
    def weights(self) -> Mapping[int, Mapping[str, Weight]]:
        """The weights of every kept step, step 0 included."""
        return self._checkpoints

    def only(self, steps: Sequence[int]) -> SyntheticRun:
        """Return the run with these checkpoints only."""
        return SyntheticRun({step: self._checkpoints[step] for step in steps}, *self._given)

    def mapped(self, change: Callable[[Weight], Weight], names: Sequence[str] | None = None) -> SyntheticRun:
        """Return the run with every stored value changed, its matrices in the order of ``names``."""
        order = list(self._checkpoints[self.steps[-1]]) if names is None else list(names)
        return SyntheticRun(
            {step: {name: change(at[name]) for name in order} for step, at in self._checkpoints.items()}, *self._given
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor under a unique name; the tensors are not copies."""
        found = {f"backbone/{name}": value for name, value in self._backbone.items()}
        for step, at in self._checkpoints.items():
            for name, value in at.items():
                parts = {"A": value.A, "B": value.B} if isinstance(value, LoraFactors) else {"W": value}
                found |= {f"{step}/{name}/{part}": tensor for part, tensor in parts.items()}
        return found


def lora_run(
    steps: Sequence[int] = tuple(range(5, 55, 5)),
    *,
    seed: int = 0,
    curvature: float = 0.3,
    noise: float = 0.02,
    start: bool = True,
    moves: bool = True,
) -> SyntheticRun:
    """Return LoRA checkpoints, fp32: A = A_0 + s a / 4, B = s b + curvature s^2 c, plus noise; s = step / last step.

    ``start`` keeps step 0; without ``moves`` no matrix moves. The metrics ``reward`` and ``accuracy`` rise.
    """
    last = steps[-1]
    drawn = {
        name: [
            _gauss(seed, name, what, *shape)
            for what, shape in zip("Aabc", 2 * [(RANK, n)] + 2 * [(m, RANK)], strict=True)
        ]
        for name, (m, n) in SHAPES.items()
    }

    def at(name: str, step: int) -> LoraFactors:
        (m, n), s = SHAPES[name], step / last if moves and name != FROZEN else 0.0
        start, a, b, c = drawn[name]
        A, B = start + s / 4 * a, s * b + curvature * s**2 * c
        if s > 0:
            A, B = A + noise * _gauss(seed, name, f"A{step}", RANK, n), B + noise * _gauss(seed, name, step, m, RANK)
        return LoraFactors(A.float(), B.float(), SCALING)

    kept = (0, *steps) if start else tuple(steps)
    return SyntheticRun({t: {name: at(name, t) for name in SHAPES} for t in kept}, None, _metrics(steps))


def dense_run(
    steps: Sequence[int] = tuple(range(5, 55, 5)),
    *,
    seed: int = 0,
    curvature: float = 0.3,
    noise: float = 0.02,
    moves: bool = True,
) -> SyntheticRun:
    """Return full-parameter checkpoints, fp32: W = W_0 + s D + curvature s^2 E plus noise; s = step / last step."""
    last = steps[-1]
    backbone = {name: _gauss(seed, name, "W", *shape).float() for name, shape in SHAPES.items()}
    drawn = {name: [_gauss(seed, name, what, *shape) for what in "DE"] for name, shape in SHAPES.items()}

    def at(name: str, step: int) -> Tensor:
        s, shape = step / last if moves and name != FROZEN else 0.0, SHAPES[name]
        D, E = drawn[name]
        moved = s * D + curvature * s**2 * E
        if s > 0:
            moved = moved + noise * _gauss(seed, name, step, *shape)
        return (backbone[name] + moved).float()

    return SyntheticRun({t: {name: at(name, t) for name in SHAPES} for t in steps}, backbone, _metrics(steps))


def write_lora_run(folder: str | Path, run: SyntheticRun | None = None, name: str = "checkpoint-{}") -> SyntheticRun:
    """Write PEFT adapters, one ``checkpoint-N`` per kept step, with the trainer's log. Returns the run.

    All factors of ``run`` need the same rank, and the scaling ``SCALING``, as those of ``lora_run`` have.
    """
    run, folder = run or lora_run(), Path(folder)
    for step, at in run.weights.items():
        tensors: dict[str, Tensor] = {}
        rank = 0
        for parameter, value in at.items():
            assert isinstance(value, LoraFactors)
            rank = value.A.shape[0]
            module = parameter.removesuffix(".weight")
            for side, tensor in (("A", value.A), ("B", value.B)):
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor.contiguous()
        modules = sorted({parameter.removesuffix(".weight").rpartition(".")[2] for parameter in at})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": int(SCALING * rank)}
        target = _new(folder / name.format(step))
        _write_json(target / "adapter_config.json", config | {"target_modules": modules})
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_log(target, run, step)
    return run


def write_model_run(folder: str | Path, run: SyntheticRun | None = None, name: str = "checkpoint-{}") -> SyntheticRun:
    """Write full models, one ``checkpoint-N`` per kept step, and the base model to ``folder.parent / "base"``."""
    run, folder = run or dense_run(), Path(folder)
    write_base(folder.parent / "base", run)
    for step, at in run.weights.items():
        target = _new(folder / name.format(step))
        _write_model(target, {parameter: value for parameter, value in at.items() if isinstance(value, Tensor)})
        _write_log(target, run, step)
    return run


def write_base(folder: str | Path, run: SyntheticRun | None = None) -> dict[str, Tensor]:
    """Write a base model with the matrices of the synthetic runs. Returns the matrices."""
    run = run or dense_run()
    matrices = {name.removeprefix("backbone/"): v for name, v in run.tensors().items() if name.startswith("backbone/")}
    _write_model(_new(Path(folder)), matrices)
    return matrices


def _metrics(steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return metrics logged at each checkpoint; they rise, though not quite evenly."""
    found = {}
    for index, step in enumerate(steps):
        rise = step / steps[-1] + 0.01 * (-1) ** index
        found[step] = {"reward": 0.2 + 0.5 * rise, "accuracy": 0.3 + 0.4 * rise}
    return found


def _gauss(seed: int, name: str, what: object, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{what}".encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _write_model(folder: Path, matrices: Mapping[str, Tensor]) -> None:
    _write_json(folder / "config.json", {"model_type": "llama", "tie_word_embeddings": False})
    save_file({k: v.contiguous() for k, v in matrices.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def _write_log(folder: Path, run: SyntheticRun, step: int) -> None:
    logged = [{"step": at, **run.metrics(at)} for at in run.steps if at <= step]
    _write_json(folder / "trainer_state.json", {"global_step": step, "log_history": logged})


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")

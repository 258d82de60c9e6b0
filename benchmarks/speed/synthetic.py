"""Runs made on the spot, the same each time: LoRA adapters in PEFT's layout, and full models as Qwen2.5 has them.

A LoRA factor moves along a few directions that turn slowly, plus a random walk; B starts at zero. Elements move by
about 1e-3 over 150 steps, as with Adam at a learning rate of 1e-5, so that what lies between two neighbouring
checkpoints is small beside the factors.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

STEPS = tuple(range(10, 160, 10))
HORIZON = 50
DIRECTIONS = 3
DRIFT, WALK = 1e-3, 3e-4
"""Root mean square of what an element moves by over ``SPAN`` steps: along the directions, and at random."""
SPAN = 150


@dataclass(frozen=True)
class Shapes:
    """The widths of a Qwen2.5 model: what decides the shapes of its matrices."""

    hidden: int
    intermediate: int
    kv: int
    layers: int
    vocab: int = 151936

    def layer(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, (m, n) each."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        mlp = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
        return {f"self_attn.{key}": shape for key, shape in attention.items()} | {
            f"mlp.{key}": shape for key, shape in mlp.items()
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every linear layer's weight by its name in the Hugging Face model."""
        layer = self.layer()
        return {f"model.layers.{i}.{key}.weight": layer[key] for i in range(self.layers) for key in layer}


QWEN_05B = Shapes(896, 4864, 128, 24)
QWEN_15B = Shapes(1536, 8960, 256, 28)
QWEN_7B = Shapes(3584, 18944, 512, 28)
TOY = Shapes(32, 48, 16, 1, vocab=64)


@dataclass(frozen=True)
class LoraRun:
    """A LoRA run of one model. Layers beyond ``distinct`` hold the numbers of the first ones again.

    That spares random numbers, not work: every layer is stored, read and compressed as its own.
    """

    shapes: Shapes
    rank: int = 64
    steps: tuple[int, ...] = STEPS
    distinct: int = 4

    @property
    def scaling(self) -> float:
        """alpha / r with alpha = 2 r."""
        return 2.0

    @property
    def factor_bytes(self) -> int:
        """All factors of all checkpoints in fp32."""
        return 4 * len(self.steps) * sum(self.rank * (m + n) for m, n in self.shapes.matrices().values())

    def checkpoints(self) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
        """Step by step, A (r, n) and B (m, r) of every matrix. The tensors are changed by the next step."""
        base = replace(self.shapes, layers=min(self.distinct, self.shapes.layers))
        made = {name: _Trajectory(name, shape, self.rank) for name, shape in base.matrices().items()}
        for step in self.steps:
            now = {name: trajectory.at(step) for name, trajectory in made.items()}
            yield step, {name: now[_first_alike(name, base.layers)] for name in self.shapes.matrices()}

    def write(self, folder: Path) -> Path:
        """``checkpoint-N`` folders as TRL and PEFT write them."""
        need_disk(folder, self.factor_bytes)
        modules = sorted({name.split(".")[-2] for name in self.shapes.matrices()})
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.scaling * self.rank,
            "target_modules": modules,
            "bias": "none",
            "init_lora_weights": True,
        }
        for step, factors in self.checkpoints():
            place = folder / f"checkpoint-{step}"
            place.mkdir(parents=True)
            stored: dict[str, Tensor] = {}
            for name, (A, B) in factors.items():
                module = f"base_model.model.{name.removesuffix('.weight')}"
                stored |= {f"{module}.lora_A.weight": A.clone(), f"{module}.lora_B.weight": B.clone()}
            save_file(stored, place / "adapter_model.safetensors", metadata={"format": "pt"})
            (place / "adapter_config.json").write_text(json.dumps(config))
        return folder


class _Trajectory:
    """A and B of one matrix, asked for at ascending steps."""

    def __init__(self, name: str, shape: tuple[int, int], rank: int) -> None:
        (m, n), self._random = shape, seeded(name)
        bound = 1 / math.sqrt(n)  # PEFT's start: A uniform, B zero
        self._A = (2 * torch.rand(rank, n, generator=self._random) - 1) * bound
        self._B = torch.zeros(m, rank)
        self._paths = [_Path(self._A.shape, self._random), _Path(self._B.shape, self._random)]
        self._step = 0

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        walk = WALK * math.sqrt((step - self._step) / SPAN)
        for factor, path in zip((self._A, self._B), self._paths, strict=True):
            factor += path.at(step) - path.at(self._step)
            factor += walk * torch.randn(factor.shape, generator=self._random)
        self._step = step
        return self._A, self._B


class _Path:
    """t -> sum_k c_k(t) x_k y_k^T: each left vector turns slowly from one direction to another."""

    def __init__(self, shape: torch.Size, random: torch.Generator) -> None:
        d, e = shape
        self._from, self._to = (torch.randn(d, DIRECTIONS, generator=random) for _ in range(2))
        weights = torch.tensor([0.5**k for k in range(DIRECTIONS)])
        self._right = torch.randn(DIRECTIONS, e, generator=random) * (weights / weights.norm())[:, None]
        self._turn = 0.3 + 0.5 * torch.rand(DIRECTIONS, generator=random)

    def at(self, step: int) -> Tensor:
        t = step / SPAN
        left = self._from * torch.cos(self._turn * t) + self._to * torch.sin(self._turn * t)
        moved: Tensor = DRIFT * t * left @ self._right
        return moved


def write_backbone(folder: Path, shapes: Shapes) -> Path:
    """A bf16 model in one safetensors file, embeddings tied, as Qwen2.5-1.5B is published."""
    return write_model(folder, shapes, step=0)


def write_model(folder: Path, shapes: Shapes, step: int) -> Path:
    """W_0 + (step / SPAN) D for each tensor, D about 5% of W_0 so that bf16 can hold it."""
    need_disk(folder, model_bytes(shapes))
    folder.mkdir(parents=True)
    start, motion = (torch.randn(2**20 + 7, generator=seeded(what)) for what in ("backbone", "motion"))
    stored = {}
    for name, shape in model_tensors(shapes).items():
        value = _tiled(start, name, shape).mul_(0.02)
        value += _tiled(motion, name, shape).mul_(0.001 * step / SPAN)
        stored[name] = value.bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": True}))
    return folder


def model_tensors(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors, norms and biases included."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shapes.vocab, shapes.hidden)}
    found |= shapes.matrices()
    for i in range(shapes.layers):
        layer = f"model.layers.{i}"
        for key, width in (("q", shapes.hidden), ("k", shapes.kv), ("v", shapes.kv)):
            found[f"{layer}.self_attn.{key}_proj.bias"] = (width,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = (shapes.hidden,)
    return found | {"model.norm.weight": (shapes.hidden,)}


def model_bytes(shapes: Shapes) -> int:
    """The model in bf16."""
    return 2 * sum(math.prod(shape) for shape in model_tensors(shapes).values())


def _tiled(bank: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """Numbers from a bank of normals, beginning at a place that the name decides."""
    count = math.prod(shape)
    begin = zlib.crc32(name.encode()) % len(bank)
    return bank.roll(-begin).repeat(-(-count // len(bank)))[:count].reshape(*shape)


def _first_alike(name: str, distinct: int) -> str:
    model, layers, layer, rest = name.split(".", 3)
    return f"{model}.{layers}.{int(layer) % distinct}.{rest}"


def seeded(name: str) -> torch.Generator:
    """A generator that depends on the name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def need_disk(folder: Path, size: int) -> None:
    """Raise ``OSError`` when the disk has no room for ``size`` bytes, rather than halfway through."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < 1.05 * size:
        raise OSError(f"{there}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; pass --scratch FOLDER")

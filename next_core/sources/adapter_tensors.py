"""What the tensors of an adapter's file are: the factors of its modules, and what is carried along unchanged.

Everything that reads or writes an adapter asks here which tensor belongs to which module and parameter.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from next_core.errors import CheckpointError, damaged, other_model
from next_core.sources.adapter_config import AdapterConfig
from next_core.sources.hf_model import PARALLEL, WRAPPERS
from next_core.sources.matrices import place_in_stack
from next_core.sources.tensor_files import Place, TensorFile
from next_core.types import LoraFactors, Parameter

PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"
"""PEFT nests the adapters of several parameters of one module: each inner one has this once more in its name."""
ADAPTER_NAME = re.compile(r"\.(lora_(?:embedding_)?[AB]|trainable_tokens_delta)\.(?!(?:weight|bias)$)[^.]+")
SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
ORDERED = re.compile(r"((gate_)?up|gate|down)_proj")
"""The experts' parameters, of which transformers defines the one called down last."""
FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")


@dataclass(frozen=True)
class AdapterModule:
    """The factors of one module: of a linear layer, of all experts of a fused layer, or of another kind.

    ``target`` is the name that PEFT compares with rank and alpha patterns. Fused experts (PEFT's
    ``target_parameters``) share two tensors: A (E r, n) holds expert after expert, and the columns of B (m, E r) run
    over the experts first.
    """

    name: str
    kind: Literal["linear", "experts", "embedding", "convolution"]
    target: str
    keys: tuple[str, str]
    shape: tuple[int, int]
    rank: int
    scaling: float
    experts: int = 1

    @property
    def moves(self) -> bool:
        """Whether it can be extrapolated; otherwise it is carried along."""
        return self.kind in ("linear", "experts")

    @property
    def parameters(self) -> list[Parameter]:
        """The weight matrices that it moves, by their names in the model."""
        name = self.target if self.target != self.name else f"{self.name}.weight"
        names = {"linear": [name], "experts": [f"{name}[{expert}]" for expert in range(self.experts)]}
        return [Parameter(each, self.shape, self.rank) for each in names.get(self.kind, ())]

    def factors(self, parameter: str, stored: tuple[Tensor, ...]) -> LoraFactors:
        """Return copies of a parameter's own factors out of the tensors A and B that are stored for the module."""
        expert = place_in_stack(parameter)
        A, B = (part_of(side, whole, self.rank, expert).clone() for side, whole in zip("AB", stored, strict=True))
        return LoraFactors(A, B, self.scaling, self.name, expert)

    def fused(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return A and B as the file stores them, from those of each parameter; smaller ranks are padded by zeros."""
        if self.kind == "linear":
            return parts[0]
        rank = max(len(A) for A, _ in parts)
        A = torch.cat([torch.nn.functional.pad(A, (0, 0, 0, rank - len(A))) for A, _ in parts])
        B = torch.stack([torch.nn.functional.pad(B, (0, rank - B.shape[1])) for _, B in parts], -1)
        return A, B.flatten(1)


def is_expert(parameter: str) -> bool:
    """Whether a parameter is one expert of a fused layer."""
    return place_in_stack(parameter) is not None


def part_of(side: str, whole: Tensor, rank: int, expert: int | None) -> Tensor:
    """Return one expert's A (r, n) or B (m, r) as a view of the tensor that holds all; None: all of it."""
    if expert is None:
        return whole
    if side == "A":
        return whole[expert * rank : (expert + 1) * rank]
    return whole[:, expert :: whole.shape[1] // rank]


def factor_keys(module: str) -> tuple[str, str]:
    """Return the names of a module's A and B in PEFT's adapter files."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def shift_keys(module: str) -> tuple[str, str]:
    """Return the names of the tensors that record how a jump moved a module's A and B."""
    return f"{module}.weight.lora_A", f"{module}.weight.lora_B"


def bias_key(module: str) -> str:
    """Return the name of the bias that a module's B adds, if it has one."""
    return f"{PREFIX}{module}.lora_B.bias"


class PlainFile(TensorFile):
    """An adapter's file under the names that PEFT gives: without those of wrappers and of the adapter.

    ``only`` selects the tensors, where the file holds more than an adapter. Raises ``CheckpointError`` where two
    tensors have the same name then.
    """

    def __init__(self, file: TensorFile, only: re.Pattern[str] = re.compile("")) -> None:
        super().__init__(file.path)
        self._file = file
        plain = {key: WRAPPERS.sub("", key).removeprefix(PARALLEL) for key in file.shapes if only.search(key)}
        bare = not any(name.startswith("base_model.") for name in plain.values())
        self.stored: dict[str, str] = {}
        """By these names the ones in the file."""
        for key, name in plain.items():
            name = (PREFIX if bare else "") + name
            name = SAVED_MODULE.sub(".", ADAPTER_NAME.sub(r".\1", name))
            if name in self.stored:
                raise _unsupported(file.path, f"'{key}' and '{self.stored[name]}' are of two adapters; save each alone")
            self.stored[name] = key
        self.shapes = {name: file.shapes[key] for name, key in self.stored.items()}

    def dtype(self, key: str) -> torch.dtype:
        return self._file.dtype(self.stored.get(key, key))

    def _values(self, key: str, rows: Place | None) -> Tensor:
        return self._file.raw(self.stored.get(key, key), rows)

    def verify(self) -> None:
        pass  # the file does so itself

    def weight_files(self) -> list[Path]:
        return self._file.weight_files()

    def unchanged(self) -> bool:
        return self._file.unchanged()


def read_modules(file: TensorFile, config: AdapterConfig) -> tuple[dict[str, AdapterModule], dict[str, str]]:
    """Return the modules of an adapter by name, and its other tensors with the reason why these are carried along.

    Raises ``CheckpointError`` for factors that do not fit each other or the config, for tensors of a LoRA variant whose
    delta is not ``scaling * B A``, and for a file without factors.
    """
    sides: dict[str, dict[str, str]] = defaultdict(dict)
    other: dict[str, str] = {}
    for key, shape in file.shapes.items():
        match = FACTOR.fullmatch(key)
        if match is not None:
            if not file.dtype(key).is_floating_point:
                raise damaged(file.path, f"stores '{key}' as {file.dtype(key)}")
            if len(shape) < 2:
                raise damaged(file.path, f"stores '{key}' with the shape {shape}: were ZeRO-3's shards not gathered?")
            sides[match["module"]][(match["embedding"] or "") + match["side"]] = key
        elif ".lora_" in key and not key.endswith(".lora_B.bias"):
            raise _unsupported(file.path, f"'{key}' is of a LoRA variant whose delta is not scaling * B A")
        else:
            other[key] = "not a LoRA factor"
    if not sides:
        first = f" (its first is '{next(iter(file.shapes))}')" if file.shapes else ""
        raise _unsupported(file.path, f"none of its tensors is a LoRA factor{first}; is it the adapter of this run?")
    fused = _expert_targets(file, sides, config)
    modules = {name: _module(file, config, name, sides[name], fused.get(name)) for name in sorted(sides)}
    for module in modules.values():
        if not module.moves:
            other |= dict.fromkeys(module.keys, f"a LoRA factor of an {module.kind}, not of a linear layer")
    return modules, other


def _module(
    file: TensorFile, config: AdapterConfig, name: str, keys: Mapping[str, str], fused: tuple[str, int] | None
) -> AdapterModule:
    shapes = {side: file.shapes[key] for side, key in keys.items()}
    if "embedding_A" in shapes:
        a, b = "embedding_A", "embedding_B"
    else:
        a, b = "A", "B"
    if set(shapes) != {a, b} or not shapes[a][0] == shapes[b][1] > 0:
        raise damaged(file.path, f"has factors of '{name}' that do not fit each other: {shapes}")
    if 0 in (shapes[b][0], shapes[a][1]):
        raise damaged(file.path, f"has a '{name}' without rows or columns")
    wide = max(len(shape) for shape in shapes.values()) > 2
    kind = "embedding" if "embedding_A" in shapes else "convolution" if wide else "linear"
    target, experts, rank = name, 1, shapes[a][0]
    if fused is not None:
        target, experts = fused
        kind, rank = "linear" if experts == 1 else "experts", rank // experts
    declared = config.rank(target)
    if rank != declared:
        raise other_model(
            f"{file.path}: '{target}' has rank {rank} but {config.path.name} says {declared:g}; "
            "config and weights are of different runs"
        )
    shape = shapes[b][0], shapes[a][1]
    return AdapterModule(name, kind, target, (keys[a], keys[b]), shape, rank, config.scaling(target, rank), experts)  # type: ignore[arg-type]


def _expert_targets(
    file: TensorFile, sides: Mapping[str, Mapping[str, str]], config: AdapterConfig
) -> dict[str, tuple[str, int]]:
    """Return the target of each module that holds fused experts (``layers.0.mlp.experts.down_proj``), and their number.

    A file does not name the parameters: PEFT wraps them in the order in which the module defines them, the first one
    innermost. Several whose order is not known are refused.
    """
    found: dict[str, tuple[str, int]] = {}
    layers: dict[str, list[str]] = defaultdict(list)
    for name, keys in sides.items():
        if "A" in keys and len(file.shapes[keys["A"]]) == 2:
            layers[name.replace(BASE_LAYER, "")].append(name)
    for layer, names in layers.items():
        linear = len(names) == 1 and file.shapes[sides[names[0]]["A"]][0] == config.rank(layer)
        targets = _targets_in(layer, [t for t in config.target_parameters if "." in t or not linear])
        if not targets:
            continue
        names.sort(key=len, reverse=True)
        if len(names) != len(targets) or not (len(targets) == 1 or all(map(ORDERED.fullmatch, targets))):
            raise _unsupported(
                file.path,
                f"'{layer}' has {len(names)} pairs of factors, and target_parameters names {targets} in it: which pair "
                "belongs to which parameter is not known",
            )
        for name, target in zip(names, targets, strict=True):
            rank, declared = file.shapes[sides[name]["A"]][0], config.rank(f"{layer}.{target}")
            if declared <= 0 or rank % declared:
                raise other_model(
                    f"{file.path}: '{name}' has rank {rank}, no multiple of the {declared:g} that {config.path.name} "
                    f"says of an expert of '{target}'; config and weights are of different runs"
                )
            found[name] = f"{layer}.{target}", int(rank // declared)
    return found


def _targets_in(layer: str, targets: Sequence[str]) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` names, in the order of transformers' experts."""
    named = set()
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if not module or layer == module or layer.endswith(f".{module}"):
            named.add(parameter)
    return sorted(named, key=lambda parameter: (parameter.startswith("down"), parameter))


def _unsupported(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}", kind="checkpoint-unsupported-adapter")

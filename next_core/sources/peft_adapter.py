"""LoRA adapter checkpoints in PEFT's format, as TRL and this project write them: deltas straight from the factors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from next_core import lowrank
from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource, LoraFactors, Parameter, PluginConfig
from next_core.lowrank import LowRank
from next_core.sources.folders import (
    JUMPS,
    SafetensorsFile,
    Shift,
    Shifts,
    TensorCache,
    find_step_folders,
    holds,
    jump_folders,
    metrics_at,
    read_json,
    read_metrics,
)
from next_core.sources.hf_model import ModelFiles
from next_core.sources.memory import lora_delta

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER = "adapter"
"""The subfolder of ``jumps/N`` that holds a jump made as an adapter."""
JUMP_PREFIX = "jump-"
"""How such an adapter is called in a live model, and in the trainer's own checkpoints."""
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that subtract the first B A from the base weights."""
SHIFT_KEYS = ("{name}.lora_A", "{name}.lora_B")


class PeftAdapterSourceConfig(PluginConfig):
    path: Path = Field(description="Folder that holds the folders of the steps")
    backbone: Path | None = Field(None, description="The base model's folder; its names and shapes are compared")


class AdapterConfig:
    """The part of PEFT's ``adapter_config.json`` that decides what the factors mean."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path)
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA adapters can be extrapolated")
        if self.raw.get("use_dora"):
            raise CheckpointError(
                f"{path}: DoRA's delta is not low-rank (its magnitude vector rescales whole rows), so its factors "
                "cannot be extrapolated; train with use_dora=False, or extrapolate merged checkpoints"
            )
        begin = self.raw.get("init_lora_weights")
        if isinstance(begin, str) and begin.startswith(CHANGES_BASE):
            raise CheckpointError(
                f"{path}: init_lora_weights {begin!r} changes the base weights, so B A is not what the model moved by; "
                "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        self.rslora = bool(self.raw.get("use_rslora"))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with PEFT's per-module alpha pattern."""
        alpha = self._number(module, "lora_alpha", "alpha_pattern")
        return alpha / (rank**0.5 if self.rslora else rank)

    def rank(self, module: str) -> int:
        """The rank the config declares for a module, per-module pattern included."""
        return int(self._number(module, "r", "rank_pattern"))

    def _number(self, module: str, key: str, pattern: str) -> float:
        try:
            return float(_match(self.raw.get(pattern) or {}, module, self.raw.get(key)))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{self.path}: {key} and {pattern} give no number for '{module}' ({error}); restore the file"
            ) from None


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


class PeftAdapterSource(CheckpointSource):
    """``checkpoint-N/adapter_model.safetensors`` as TRL writes it, or as this project, OpenRLHF and verl do."""

    name = "peft-adapter"
    config_class = PeftAdapterSourceConfig

    def __init__(self, config: PeftAdapterSourceConfig) -> None:
        super().__init__(config)
        self._folders: dict[int, Path] = {}
        self._files: dict[int, SafetensorsFile] = {}
        self._scaling: dict[str, float] = {}
        self._parameters: tuple[Parameter, ...] = ()
        self._skipped: dict[str, str] = {}
        self._shifts = Shifts(config.path)
        self._cache = TensorCache()
        self._counted: dict[tuple[str, int], tuple[Shift, ...]] = {}  # which jumps a cached tensor has in it
        self._beside: dict[int, list[tuple[SafetensorsFile, AdapterConfig]]] = {}
        self._metrics: dict[int, dict[str, float]] | None = None
        self.refresh()

    @classmethod
    def detect(cls, path: Path) -> bool:
        return holds(path, (CONFIG_FILE, WEIGHTS_FILE))

    def refresh(self) -> None:
        """Take in the checkpoints that were written since the folder was opened."""
        folders = find_step_folders(self.config.path, known=self._files)
        for step in set(self._files) - set(folders):
            del self._files[step]
            for parameter in self._parameters:
                self._cache.drop((parameter.name, step))
        for step, folder in folders.items():
            if step not in self._files:
                self._open(step, folder)
        self._folders = folders
        self._shifts.refresh()
        self._beside = {}
        self._metrics = None

    def _open(self, step: int, folder: Path) -> None:
        if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
            raise CheckpointError(f"{folder}/adapter_model.bin is a pickle, which can run code; save safetensors")
        config = AdapterConfig(folder / CONFIG_FILE)
        file = SafetensorsFile(folder / WEIGHTS_FILE)
        sides: dict[str, dict[str, tuple[int, ...]]] = {}
        skipped: dict[str, str] = {}
        for key, shape in file.shapes.items():
            match = KEY.fullmatch(key)
            if match is None or len(shape) != 2:
                skipped[key] = "not a LoRA factor of a linear layer"
            else:
                sides.setdefault(match["module"], {})[match["side"]] = shape
        parameters, scaling = [], {}
        for module, shapes in sorted(sides.items()):
            if set(shapes) != {"A", "B"} or not shapes["A"][0] == shapes["B"][1] > 0:
                raise CheckpointError(
                    f"{file.path}: factors of '{module}' do not fit: {shapes}; restore the checkpoint"
                )
            rank = shapes["A"][0]
            if rank != config.rank(module):
                raise CheckpointError(
                    f"{file.path}: '{module}' has rank {rank} but {CONFIG_FILE} says {config.rank(module)}; "
                    "config and weights are of different runs"
                )
            name = f"{module}.weight"
            parameters.append(Parameter(name, (shapes["B"][0], shapes["A"][1]), rank))
            scaling[name] = config.scaling(module, rank)
        if not parameters:
            raise CheckpointError(f"{file.path} holds no LoRA factors")
        self._compare(folder, tuple(parameters), scaling)
        self._files[step], self._skipped = file, skipped

    def _compare(self, folder: Path, parameters: tuple[Parameter, ...], scaling: dict[str, float]) -> None:
        if not self._parameters:
            if self.config.backbone is not None:
                ModelFiles(self.config.backbone).require({p.name: p.shape for p in parameters})
            self._parameters, self._scaling = parameters, scaling
            return
        for ours, theirs in zip(self._parameters, parameters, strict=False):
            if ours != theirs:
                raise CheckpointError(
                    f"{folder}: '{theirs.name}' {theirs.shape} of rank {theirs.rank} where the first checkpoint has "
                    f"'{ours.name}' {ours.shape} of rank {ours.rank}; these are adapters of different runs"
                )
        if len(parameters) != len(self._parameters) or scaling != self._scaling:
            raise CheckpointError(f"{folder}: other modules or another lora_alpha than the first checkpoint")

    @property
    def steps(self) -> tuple[int, ...]:
        # Step 0, where it was kept, is where RL began and not an observation of it.
        return tuple(step for step in self._folders if step > 0 and step >= self._shifts.start)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self._parameters

    @property
    def skipped(self) -> Mapping[str, str]:
        return self._skipped

    def adapter_config(self) -> dict[str, Any]:
        """The newest checkpoint's ``adapter_config.json``."""
        return AdapterConfig(self._folders[self.steps[-1]] / CONFIG_FILE).raw

    def scaling(self, name: str) -> float:
        """alpha / r (or alpha / sqrt(r)) of one parameter."""
        return self._scaling[name]

    def rank(self, name: str) -> int:
        """The LoRA rank of one parameter."""
        return next(p.rank for p in self._parameters if p.name == name and p.rank is not None)

    def extra_tensors(self, step: int) -> dict[str, Tensor]:
        """What an adapter file holds besides LoRA factors of linear layers; it is carried along as trained."""
        return {key: self._files[step].read(key) for key in self._skipped}

    def stored(self, key: str, step: int) -> Tensor:
        """One tensor of a checkpoint by its name in the file, with the jump made right after it."""
        value, match = self._files[step].read(key), KEY.fullmatch(key)
        if match is not None:
            shift_key = SHIFT_KEYS["AB".index(match["side"])].format(name=f"{match['module']}.weight")
            for shift in self._shifts.made_after(step):
                value = shift.added(value, shift_key)
        return value

    def remember(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a checkpoint that is being written, by their names in the file, to spare reading them."""
        for parameter in self._parameters:
            keys = self._keys(parameter.name)
            self._cache.put((parameter.name, step), tuple(tensors[key] for key in keys))
            self._counted.pop((parameter.name, step), None)

    def _keys(self, name: str) -> list[str]:
        return [f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight" for side in "AB"]

    def factors(self, name: str, step: int) -> LoraFactors:
        shifts = self._shifts.since(step)
        counted = self._counted.get((name, step), ())
        if shifts[: len(counted)] != counted:  # a jump was rolled back: begin with what is stored
            self._cache.drop((name, step))
            counted = ()
        A, B = self._raw(name, step)
        if shifts != counted:
            for shift in shifts[len(counted) :]:
                A, B = (shift.added(x, key.format(name=name)) for x, key in zip((A, B), SHIFT_KEYS, strict=True))
            self._cache.put((name, step), (A, B))
            self._counted[name, step] = shifts
        return LoraFactors(A, B, self._scaling[name])

    def _raw(self, name: str, step: int) -> tuple[Tensor, ...]:
        cached = self._cache.get((name, step))
        if cached is None:
            self._counted.pop((name, step), None)
            try:
                file = self._files[step]
            except KeyError:
                raise CheckpointError(f"step {step} was not observed; observed steps: {self.steps}") from None
            cached = tuple(file.read(key) for key in self._keys(name))
            self._cache.put((name, step), cached)
        return cached

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank:
        if since is None and step > 0 and 0 in self._files:
            start = self.factors(name, 0)
            # A fresh adapter has B = 0 and adds nothing; one that was trained before does, and jumps move the start.
            return lora_delta(self.factors(name, step), start if bool(start.B.any()) else None)
        return lora_delta(self.factors(name, step), None if since is None else self.factors(name, since))

    def position(self, name: str, step: int) -> LowRank:
        return lowrank.concatenate([lora_delta(self.factors(name, step), None), *self.beside(name, step)])

    def beside(self, name: str, step: int) -> list[LowRank]:
        """The jumps that stand in frozen adapters beside the trained one, as far as they touch this parameter."""
        if step not in self._beside:
            paths = self._jump_adapters(step)
            self._beside[step] = [(SafetensorsFile(p / WEIGHTS_FILE), AdapterConfig(p / CONFIG_FILE)) for p in paths]
        module = name.removesuffix(".weight")
        A, B = self._keys(name)
        found = []
        for file, config in self._beside[step]:
            if A in file.shapes:
                right, left = file.read(A).double(), file.read(B).double()
                found.append(LowRank(config.scaling(module, right.shape[0]) * left, right))
        return found

    def _jump_adapters(self, step: int) -> list[Path]:
        if self._shifts.ours:
            jumps = jump_folders(self.config.path.parent / JUMPS)
            return [path / ADAPTER for path, record in jumps if record.get("adapter") and record["step"] <= step]
        return sorted(self._folders[step].glob(f"{JUMP_PREFIX}*"), key=lambda path: (len(path.name), path.name))

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        if self._metrics is None:
            self._metrics = read_metrics(self._folders)
        return metrics_at(self._metrics, step, since)

"""LoRA adapter checkpoints in PEFT's format, whichever trainer wrote them: deltas straight from the factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.mathematics import low_rank as lowrank
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_files import CONFIG_FILE, KEY, WEIGHTS_FILE, AdapterFiles
from next_core.sources.deepspeed import reader
from next_core.sources.hf_model import ModelFiles
from next_core.sources.jumps import Shift, jump_folders
from next_core.sources.layouts import ADAPTER_FILES, holds
from next_core.sources.memory import lora_delta
from next_core.sources.mismatch import mismatch
from next_core.sources.run_folder import DiskSourceConfig, RunFolder
from next_core.sources.tensor_cache import TensorCache
from next_core.types import LoraFactors, Parameter

ADAPTER = "adapter"
"""The subfolder of ``jumps/N`` that holds a jump made as an adapter."""
JUMP_PREFIX = "jump-"
"""How such an adapter is called in a live model, and in the trainer's own checkpoints."""
SHIFT_KEYS = ("{name}.lora_A", "{name}.lora_B")
NO_ADAPTER = "lora-zero"
"""What stands for the adapter where RL began, when step 0 was not kept: B = 0."""


class PeftAdapterSourceConfig(DiskSourceConfig):
    backbone: Path | None = Field(None, description="The base model's folder; its names and shapes are compared")


class PeftAdapterSource(CheckpointSource):
    """``checkpoint-N/adapter_model.safetensors`` as TRL writes it, or as this project, OpenRLHF and verl do."""

    name = "peft-adapter"
    config_class = PeftAdapterSourceConfig

    def __init__(self, config: PeftAdapterSourceConfig) -> None:
        super().__init__(config)
        allow, through = config.allow_pickle, reader(config.masters, config.allow_pickle)
        self._run = RunFolder(config, lambda folder, step: AdapterFiles(folder, allow, through(folder, step)))
        self._shifts = self._run.shifts
        self._first: AdapterFiles | None = None
        self._cache = TensorCache()
        self._counted: dict[tuple[str, int], tuple[Shift, ...]] = {}  # which jumps a cached tensor has in it
        self._beside: dict[int, list[AdapterFiles]] = {}
        self._as_of: int | None = None
        self.refresh()

    @classmethod
    def detect(cls, path: Path, folders: Sequence[Path] = ()) -> bool:
        return holds(path, ADAPTER_FILES, folders)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.config, self._as_of)  # another process opens the folder for itself

    def as_of(self, step: int) -> PeftAdapterSource:
        shifts = self._shifts.as_of(step)
        if shifts is self._shifts:
            return self
        found = object.__new__(type(self))  # copy.copy would open the folder again, as another process does
        found.__dict__.update(self.__dict__)
        found._run, found._shifts, found._as_of = copy.copy(self._run), shifts, step
        found._run.shifts = shifts
        found._cache, found._counted, found._beside = TensorCache(), {}, {}
        return found

    def refresh(self) -> None:
        """Take in the checkpoints that were written since the folder was opened."""
        for step in self._run.refresh(self._check):
            for parameter in self.parameters:
                self._cache.drop((parameter.name, step))
        self._beside = {}

    def _check(self, adapters: Mapping[int, AdapterFiles]) -> None:
        """Raise ``CheckpointError`` unless all adapters are of one run, and of this backbone."""
        first = self._first or next(iter(adapters.values()), None)
        if first is None:
            return
        if self._first is None and self.config.backbone is not None:
            backbone = ModelFiles(self.config.backbone, self.config.allow_pickle)
            backbone.require({p.name: p.shape for p in first.parameters})
        ours = {p.name: (*p.shape, p.rank or 0) for p in first.parameters}
        for adapter in adapters.values():
            theirs = {p.name: (*p.shape, p.rank or 0) for p in adapter.parameters}
            different = mismatch(ours, theirs, f"{first.folder} (rows, columns, rank)")
            if different is not None:
                raise CheckpointError(f"{adapter.folder}: {different}")
            if adapter.scaling != first.scaling:
                name = next(name for name, scaling in first.scaling.items() if adapter.scaling[name] != scaling)
                raise CheckpointError(
                    f"{adapter.folder}: '{name}' is scaled by {adapter.scaling[name]:g} but by {first.scaling[name]:g} "
                    f"in {first.folder}; lora_alpha must not change within a run"
                )
        self._first = first

    @property
    def naming(self) -> str:
        """How the folders of the steps are named, with N for the step."""
        return self._run.naming

    @property
    def notes(self) -> Sequence[str]:
        return self._run.notes()

    @property
    def steps(self) -> tuple[int, ...]:
        # Step 0, where it was kept, is where RL began and not an observation of it.
        return tuple(step for step in self._adapters if step > 0 and step >= self._shifts.start)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return () if self._first is None else self._first.parameters

    @property
    def skipped(self) -> Mapping[str, str]:
        newest = self._newest()
        return {} if newest is None else newest.skipped

    @property
    def _adapters(self) -> Mapping[int, AdapterFiles]:
        return self._run.checkpoints

    def _newest(self) -> AdapterFiles | None:
        return next(reversed(self._run.checkpoints.values()), None)

    def _adapter(self, step: int) -> AdapterFiles:
        try:
            return self._run.checkpoints[step]
        except KeyError:
            raise CheckpointError(f"step {step} was not observed; observed steps: {self.steps}") from None

    def precision(self, name: str) -> torch.dtype:
        """The coarser of the precisions of the newest checkpoint's A and B."""
        newest = self._newest()
        if newest is None:
            return torch.float32
        return max((newest.file.dtype(key) for key in self._keys(name)), key=lambda dtype: torch.finfo(dtype).eps)

    def fingerprint(self, step: int | None) -> str | None:
        """A digest of the adapter at a step and of the jumps since; with None, of the adapter as RL began."""
        if step is None:
            return self._run.digest(self._run.checkpoints.get(0, NO_ADAPTER), 0)
        return self._run.digest(self._adapter(step), step)

    def adapter_config(self) -> dict[str, Any]:
        """The newest checkpoint's ``adapter_config.json``."""
        return dict(self._adapter(self.steps[-1]).config.raw)

    def scaling(self, name: str) -> float:
        """alpha / r (or alpha / sqrt(r)) of one parameter."""
        return self._first.scaling[name] if self._first is not None else 1.0

    def rank(self, name: str) -> int:
        """The LoRA rank of one parameter."""
        return next(p.rank for p in self.parameters if p.name == name and p.rank is not None)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._adapter(step).folder

    def extra_tensors(self, step: int) -> dict[str, Tensor]:
        """What an adapter file holds besides LoRA factors of linear layers; it is carried along as trained."""
        return {key: self._adapter(step).file.read(key) for key in self._adapter(step).skipped}

    def stored(self, key: str, step: int) -> Tensor:
        """One tensor of a checkpoint by its name in the file, with the jump made right after it."""
        value, match = self._adapter(step).file.read(key), KEY.fullmatch(key)
        if match is not None:
            shift_key = SHIFT_KEYS["AB".index(match["side"])].format(name=f"{match['module']}.weight")
            for shift in self._shifts.made_after(step):
                value = shift.added(value, shift_key)
        return value

    def remember(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a checkpoint that is being written, by their names in the file, to spare reading them."""
        for parameter in self.parameters:
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
        return LoraFactors(A.clone(), B.clone(), self.scaling(name))  # a predictor may write into what it is given

    def _raw(self, name: str, step: int) -> tuple[Tensor, ...]:
        cached = self._cache.get((name, step))
        if cached is None:
            self._counted.pop((name, step), None)
            file = self._adapter(step).file
            cached = tuple(file.read(key) for key in self._keys(name))
            self._cache.put((name, step), cached)
        return cached

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank:
        if since is None:
            return lora_delta(self.factors(name, step), self.start(name) if step > 0 else None)
        return lora_delta(self.factors(name, step), self.factors(name, since))

    def start(self, name: str) -> LoraFactors | None:
        if 0 not in self._adapters:
            return None
        first = self.factors(name, 0)
        # A fresh adapter has B = 0 and adds nothing; one that was trained before does, and jumps move the start.
        return first if bool(first.B.any()) else None

    def position(self, name: str, step: int) -> LowRank:
        return lowrank.concatenate([lora_delta(self.factors(name, step), None), *self.beside(name, step)])

    def beside(self, name: str, step: int) -> list[LowRank]:
        """The jumps that stand in frozen adapters beside the trained one, as far as they touch this parameter."""
        if step not in self._beside:
            self._beside[step] = [AdapterFiles(path) for path in self._jump_adapters(step)]
        A, B = self._keys(name)
        return [
            LowRank(jump.scaling[name] * jump.file.read(B).double(), jump.file.read(A).double())
            for jump in self._beside[step]
            if name in jump.scaling
        ]

    def _jump_adapters(self, step: int) -> list[Path]:
        if self._shifts.ours:
            jumps = jump_folders(self._shifts.root)
            return [path / ADAPTER for path, record in jumps if record.get("adapter") and record["step"] <= step]
        folder = self._adapter(step).folder
        return sorted(folder.glob(f"{JUMP_PREFIX}*"), key=lambda path: (len(path.name), path.name))

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        return self._run.logged_metrics()


def _reopen(cls: type[PeftAdapterSource], config: PeftAdapterSourceConfig, as_of: int | None) -> PeftAdapterSource:
    source = cls(config)
    return source if as_of is None else source.as_of(as_of)


__all__ = [
    "ADAPTER",
    "CONFIG_FILE",
    "JUMP_PREFIX",
    "KEY",
    "SHIFT_KEYS",
    "WEIGHTS_FILE",
    "PeftAdapterSource",
    "PeftAdapterSourceConfig",
]

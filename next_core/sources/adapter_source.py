"""LoRA adapter checkpoints in PEFT's format, whichever trainer wrote them: deltas straight from the factors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from next_core.errors import CheckpointError, other_model
from next_core.interfaces.checkpoint_source import WARNING
from next_core.mathematics import low_rank
from next_core.mathematics.low_rank import LowRank
from next_core.sources.adapter_files import AdapterFiles
from next_core.sources.adapter_tensors import AdapterModule, is_expert, shift_keys
from next_core.sources.backbone import require, sign_of_codes
from next_core.sources.deepspeed import replacement
from next_core.sources.folder_source import DiskSourceConfig, FolderSource, check_same_shapes
from next_core.sources.hf_model import ModelFiles
from next_core.sources.jumps import Shift, TensorCache, jump_folders
from next_core.sources.layouts import ADAPTER_FILES, JUMP_PREFIX, LORA_FILES
from next_core.sources.matrices import HEADS
from next_core.sources.memory import lora_delta
from next_core.types import LoraFactors, Parameter

ADAPTER = "adapter"  # The subfolder of ``jumps/N`` with a jump that was made as an adapter
FAR = 5.0  # How many times farther from the base model than training moves in as many steps a first checkpoint may be
SAMPLE, SPANS = 12, 3  # Matrices, and intervals between checkpoints, that this is measured on


class PeftAdapterSourceConfig(DiskSourceConfig):
    backbone: Path | None = Field(None, description="The base model's folder; its names and shapes are compared")


class PeftAdapterSource(FolderSource[AdapterFiles]):
    """``checkpoint-N/adapter_model.safetensors`` as TRL writes it, or as this project, OpenRLHF and verl do."""

    name = "peft-adapter"
    config_class = PeftAdapterSourceConfig
    FILES = (*ADAPTER_FILES, *LORA_FILES)

    def __init__(self, config: PeftAdapterSourceConfig) -> None:
        super().__init__(config)
        self._replacement = replacement(config.masters, config.allow_pickle)
        self._first: AdapterFiles | None = None
        self._cache = TensorCache()
        self._added: dict[tuple[str, int], tuple[Shift, ...]] = {}  # the jumps that a cached tensor contains
        self._jump_adapters: dict[int, list[AdapterFiles]] = {}
        self._as_of: int | None = None
        self._far: list[str] | None = None  # the warning about the start, once it was computed
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.config, self._as_of)

    def as_of(self, step: int) -> PeftAdapterSource:
        shifts = self._shifts.as_of(step)
        if shifts is self._shifts:
            return self
        view = object.__new__(type(self))  # copy.copy would open the folder again, as another process does
        view.__dict__.update(self.__dict__)
        view._shifts, view._as_of = shifts, step
        view._cache, view._added, view._jump_adapters = TensorCache(), {}, {}
        return view

    def refresh(self) -> set[int]:
        stale = super().refresh()
        for step in stale:
            for module in self.modules:
                self._cache.drop((module.name, step))
        self._jump_adapters, self._far = {}, None
        return stale

    def _open(self, folder: Path, step: int) -> AdapterFiles:
        return AdapterFiles(folder, self.config.allow_pickle, self._replacement(folder, step))

    def _check(self, checkpoints: Mapping[int, AdapterFiles]) -> None:
        first = self._first or next(iter(checkpoints.values()), None)
        if first is None:
            return
        if self._first is None and self.config.backbone is not None:
            backbone = ModelFiles(self.config.backbone, self.config.allow_pickle)
            # Codes have other shapes than the weights, which are not read here.
            if sign_of_codes(backbone) is None:
                shapes = {p.name: p.shape for p in first.parameters if not is_expert(p.name)}  # stored in too many ways
                # A tied head may be stored as the embedding alone.
                tied = {name for name in shapes if name.endswith(HEADS) and backbone.declares_tie()}
                require(backbone, {name: shape for name, shape in shapes.items() if name not in tied})
        ours = {p.name: (*p.shape, p.rank or 0) for p in first.parameters}
        for adapter in checkpoints.values():
            theirs = {p.name: (*p.shape, p.rank or 0) for p in adapter.parameters}
            check_same_shapes(ours, theirs, adapter.folder, f"{first.folder} (rows, columns, rank)")
            if adapter.scaling != first.scaling:
                name = next(name for name, scaling in first.scaling.items() if adapter.scaling[name] != scaling)
                raise other_model(
                    f"{adapter.folder}: '{name}' is scaled by {adapter.scaling[name]:g} but by {first.scaling[name]:g} "
                    f"in {first.folder}; lora_alpha must not change within a run"
                )
        self._first = first

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return () if self._first is None else self._first.parameters

    @property
    def modules(self) -> tuple[AdapterModule, ...]:
        """The modules of the newest adapter, those that cannot be extrapolated included."""
        newest = self._newest()
        return () if newest is None else tuple(newest.modules.values())

    @property
    def skipped(self) -> Mapping[str, str]:
        newest = self._newest()
        return {} if newest is None else newest.skipped

    @property
    def notes(self) -> Sequence[str]:
        if self._far is None:
            try:
                self._far = self._start_note()
            except CheckpointError:  # values that are not finite: whoever uses them hears of it
                self._far = []
        return [*super().notes, *self._far]

    def _start_note(self) -> list[str]:
        """Return a warning if the first checkpoint is too far from the base model for RL to have gone there.

        In t steps from a fresh adapter, training goes about as far as in t steps later. An adapter that was trained
        before is far away at once.
        """
        steps, names = self.steps, [p.name for p in self.parameters[:: max(1, len(self.parameters) // SAMPLE)]]
        if len(steps) < 2 or 0 in self._checkpoints or self.begins:
            return []
        spans = [(steps[0], None), *((later, before) for before, later in itertools.pairwise(steps[: 1 + SPANS]))]
        reached, *moves = (math.hypot(*(float(self.delta(name, *span).norm()) for name in names)) for span in spans)
        speed = max(move / (later - (before or 0)) for move, (later, before) in zip(moves, spans[1:], strict=True))
        if speed == 0.0 or reached <= FAR * speed * steps[0]:
            return []
        times = f"{reached / (speed * steps[0]):.0f} times"
        return [
            f"{WARNING}step {steps[0]} is {times} as far from the base model as training moves in so many steps: did "
            "RL continue an adapter that was trained before, as by SFT? What counts from the start includes that one, "
            "unless you name it: --start ADAPTER, or start="
        ]

    def precision(self, name: str) -> torch.dtype:
        """Return the coarser of the precisions of the newest checkpoint's A and B."""
        newest = self._newest()
        if newest is None:
            return torch.float32
        keys = newest.module_of(name).keys
        return max((newest.file.dtype(key) for key in keys), key=lambda dtype: torch.finfo(dtype).eps)

    def fingerprint(self, step: int | None) -> str | None:
        """Return a digest of the adapter at a step and of the jumps since; with None, of the adapter as RL began."""
        if step is None:
            return self._digest(self._step_0(), 0)
        return self._digest(self._checkpoint(step), step)

    def adapter_config(self) -> dict[str, Any]:
        """Return the newest checkpoint's ``adapter_config.json``."""
        return dict(self._checkpoint(self.steps[-1]).config.raw)

    def adapter(self, step: int) -> AdapterFiles:
        """Return the files of a checkpoint."""
        return self._checkpoint(step)

    def tied_embedding(self, head: AdapterModule) -> AdapterModule | None:
        """Return the embedding whose factors are those of a head, transposed (PEFT's ``ensure_weight_tying``)."""
        if not self.adapter_config().get("ensure_weight_tying"):
            return None
        same = head.shape[::-1], head.rank, "embedding"
        return next((m for m in self.modules if (m.shape, m.rank, m.kind) == same), None)

    def stored(self, key: str, step: int) -> Tensor:
        """Return a tensor of a checkpoint by its name in the file, plus the jumps made right after it."""
        value = self._checkpoint(step).file.read(key)
        for module in self.modules:
            if key in module.keys and module.moves:
                shift_key = shift_keys(module.name)[module.keys.index(key)]
                for shift in self._shifts.made_after(step):
                    value = shift.added(value, shift_key)
        return value

    def remember(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Cache the tensors of a checkpoint that is being written, by their names in the file, to avoid reading it."""
        for module in self.modules:
            self._cache.put((module.name, step), tuple(tensors[key] for key in module.keys))
            self._added.pop((module.name, step), None)

    def factors(self, name: str, step: int) -> LoraFactors:
        module = self._checkpoint(step).module_of(name)
        shifts = self._shifts.since(step)
        added = self._added.get((module.name, step), ())
        if shifts[: len(added)] != added:  # a jump was rolled back: start again from what is stored
            self._cache.drop((module.name, step))
            added = ()
        A, B = self._cached(module, step)
        if shifts != added:
            for shift in shifts[len(added) :]:
                A, B = (shift.added(x, key) for x, key in zip((A, B), shift_keys(module.name), strict=True))
            self._cache.put((module.name, step), (A, B))
            self._added[module.name, step] = shifts
        return module.factors(name, (A, B))

    def _cached(self, module: AdapterModule, step: int) -> tuple[Tensor, ...]:
        cached = self._cache.get((module.name, step))
        if cached is None:
            self._added.pop((module.name, step), None)
            cached = self._checkpoint(step).read(module)
            self._cache.put((module.name, step), cached)
        return cached

    def delta(self, name: str, step: int, since: int | None = None) -> LowRank:
        if since is None:
            return lora_delta(self.factors(name, step), self.start(name) if step > 0 else None)
        return lora_delta(self.factors(name, step), self.factors(name, since))

    def start(self, name: str) -> LoraFactors | None:
        if self._step_0() is None:
            return None
        first = self.factors(name, 0)
        # A fresh adapter has B = 0 and adds nothing. An adapter that was trained before does, and jumps move the start.
        return first if bool(first.B.any()) else None

    def position(self, name: str, step: int) -> LowRank:
        return low_rank.concatenate([lora_delta(self.factors(name, step), None), *self.jump_deltas(name, step)])

    def jump_deltas(self, name: str, step: int) -> list[LowRank]:
        """Return the deltas of the frozen jump adapters next to the trained one that touch a parameter."""
        if step not in self._jump_adapters:
            self._jump_adapters[step] = [AdapterFiles(path) for path in self._jump_adapter_folders(step)]
        return [lora_delta(jump.factors(name), None) for jump in self._jump_adapters[step] if name in jump.scaling]

    def _jump_adapter_folders(self, step: int) -> list[Path]:
        if self._shifts.in_run_folder:
            jumps = jump_folders(self._shifts.root)
            return [path / ADAPTER for path, record in jumps if record.get("adapter") and record["step"] <= step]
        found = self._checkpoint(step).folder.glob(f"{JUMP_PREFIX}*")
        return sorted(found, key=lambda path: (len(path.name), path.name))


def _reopen(cls: type[PeftAdapterSource], config: PeftAdapterSourceConfig, as_of: int | None) -> PeftAdapterSource:
    source = cls(config)
    return source if as_of is None else source.as_of(as_of)

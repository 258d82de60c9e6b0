"""Full-parameter checkpoints (one file or sharded): dense deltas, one matrix at a time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.mathematics.row_blocks import row_blocks
from next_core.sources.backbone import refuse_quantized, require, use_names
from next_core.sources.deepspeed import replacement
from next_core.sources.distributed_files import DISTRIBUTED
from next_core.sources.folder_source import DiskSourceConfig, FolderSource, check_same_shapes
from next_core.sources.hf_model import ModelFiles
from next_core.sources.layouts import (
    ADAPTER_FILES,
    LORA_FILES,
    MODEL_FILES,
    MODEL_PICKLES,
    SHARDS,
    contains_checkpoints,
)
from next_core.sources.matrices import EMBEDDINGS, HEADS, matrices_in, place_in_stack, stored_name
from next_core.types import Parameter

BLOCK = 2**22  # Number of values compared at a time


def tied_names(models: Sequence[ModelFiles]) -> tuple[str, str] | None:
    """Return the names of head and embedding if they are one parameter in these models of one run, else None.

    They are if ``config.json`` says so, or if some models store both and others only one. Raises ``CheckpointError``
    if a model that is tied in this way stores two that differ.
    """
    names = {name for model in models for name in model.shapes}
    head, embedding = _only(names, HEADS), _only(names, EMBEDDINGS)
    if head is None or embedding is None:
        return None
    declared = {model.declares_tie() for model in models}
    stored = [frozenset(model.shapes) & {head, embedding} for model in models]
    if True not in declared and (False in declared or len(set(stored)) == 1):
        return None
    for model, both in zip(models, stored, strict=True):
        if len(both) == 2 and not _equal(model, head, embedding):
            why = "config.json says that they are tied" if True in declared else "other checkpoints store only one"
            raise CheckpointError(
                f"{model.folder}: '{head}' and '{embedding}' differ, but {why}; correct config.json, or restore this "
                "checkpoint",
                kind="checkpoint-damaged",
            )
    return head, embedding


def _only(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    matching = [name for name in names if name.endswith(endings)]
    return matching[0] if len(matching) == 1 else None


def _equal(model: ModelFiles, one: str, other: str) -> bool:
    if model.shapes[one] != model.shapes[other]:
        return False
    blocks = row_blocks(model.shapes[one], BLOCK)
    return all(torch.equal(model.read(one, rows), model.read(other, rows)) for rows in blocks)


class FullModelSourceConfig(DiskSourceConfig):
    backbone: Path | None = Field(None, description="The base model's folder; without it, step 0 must be there")


class FullModelSource(FolderSource[ModelFiles]):
    """``checkpoint-N/model.safetensors`` or its shards; only matrices are extrapolated, stacked ones one by one."""

    name = "full-model"
    config_class = FullModelSourceConfig
    FILES = (*MODEL_FILES, *MODEL_PICKLES, SHARDS)

    def __init__(self, config: FullModelSourceConfig) -> None:
        super().__init__(config)
        self._tied: Mapping[str, str] = {}
        self._parameters: tuple[Parameter, ...] = ()
        self._skipped: Mapping[str, str] = {}
        self._backbone = ModelFiles(config.backbone, config.allow_pickle) if config.backbone is not None else None
        self._replacement = replacement(config.masters, config.allow_pickle)
        self.refresh()

    @classmethod
    def detect(cls, path: Path, folders: Sequence[Path] = ()) -> bool:
        found = contains_checkpoints(path, cls.FILES, folders) or (
            contains_checkpoints(path, DISTRIBUTED, folders) and not contains_checkpoints(path, ADAPTER_FILES, folders)
        )
        return found and not contains_checkpoints(path, LORA_FILES, folders)

    def _open(self, folder: Path, step: int) -> ModelFiles:
        return ModelFiles(folder, self.config.allow_pickle, self._replacement(folder, step))

    def _check(self, checkpoints: Mapping[int, ModelFiles]) -> None:
        models = list(checkpoints.values())
        everything = models if self._backbone is None else [self._backbone, *models]
        for model in everything:
            refuse_quantized(model)
        if models and self._backbone is not None:
            use_names(self._backbone, models[0].shapes)
        tied = tied_names(everything) if models else None
        if tied is not None:
            for model in everything:
                model.tie(*tied)
            self._tied = dict([tied])
        for model in models[1:]:
            check_same_shapes(models[0].shapes, model.shapes, model.folder, f"step {next(iter(checkpoints))}")
        if models and self._backbone is not None:
            require(self._backbone, models[0].matrices)
        if models:
            self._skipped = {name: reason for name in models[-1].shapes if (reason := _why_skipped(models[-1], name))}
            matrices = sorted(models[-1].matrices.items())
            self._parameters = tuple(Parameter(*each) for each in matrices if stored_name(each[0]) not in self._skipped)

    @property
    def stores_full_weights(self) -> bool:
        return True

    @property
    def tied(self) -> Mapping[str, str]:
        return self._tied

    @property
    def notes(self) -> Sequence[str]:
        tied = [f"{head} and {one} are one parameter, read once as {one}" for head, one in self.tied.items()]
        return [*super().notes, *tied]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self._parameters

    @property
    def skipped(self) -> Mapping[str, str]:
        return self._skipped

    @property
    def trained_weights(self) -> int:
        newest = self._newest()
        floats = () if newest is None else (key for key in newest.shapes if newest.dtype(key).is_floating_point)
        return sum(math.prod(newest.shapes[key]) for key in floats) if newest is not None else 0

    def model(self, step: int | None) -> ModelFiles:
        if step is not None:
            return self._checkpoint(step)
        start = self._step_0() or self._backbone  # step 0, if it was kept, is where RL began
        if start is None:
            raise CheckpointError(
                f"{self.config.path} has no backbone; pass --backbone", kind="config-missing-backbone"
            )
        return start

    def precision(self, name: str) -> torch.dtype:
        newest = self._newest()
        return torch.float32 if newest is None else newest.dtype(name)

    def fingerprint(self, step: int | None) -> str | None:
        return self._digest(self.model(step), step or 0)

    def weight(self, name: str, step: int | None, rows: slice | None = None) -> Tensor:
        value = self.model(step).read(name, rows)
        for shift in self._shifts.since(step or 0):
            value = shift.added(value, name, rows)
        return value

    def weight_as_stored(self, name: str, step: int | None, rows: slice | None = None) -> Tensor:
        jumped = self._shifts.since(step or 0)
        return self.weight(name, step, rows) if jumped else self.model(step).raw(name, rows)

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        return self.weight(name, step, rows) - self.weight(name, since, rows)

    def delta(self, name: str, step: int, since: int | None = None) -> Tensor:
        # In fp32: the difference of two neighbours is exact there, and twice as fast to use as in fp64.
        return self.weight(name, step) - self.weight(name, since)

    def stored(self, key: str, step: int) -> Tensor:
        """Return a tensor of a checkpoint, plus the jumps made right after it."""
        value = self.model(step).read(key).clone()  # what was read is kept for the next rows
        for shift in self._shifts.made_after(step):
            for name in matrices_in(key, value.shape):
                index = place_in_stack(name)
                if index is None:
                    value = shift.added(value, name)
                else:
                    value[index] = shift.added(value[index], name)
        return value

    def position(self, name: str, step: int) -> Tensor:
        on_disk = self._backbone or self.model(None)  # a backbone need not be where RL began
        return self.weight(name, step).double() - on_disk.read(name)


def _why_skipped(model: ModelFiles, name: str) -> str:
    shape = model.shapes[name]
    if not matrices_in(name, shape) and 0 not in shape:
        return "not a matrix; stays as trained"
    if 0 in shape:
        return "has no values"
    return "" if model.dtype(name).is_floating_point else "stored as integers; stays as it is"

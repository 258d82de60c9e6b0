"""Full-parameter checkpoints (safetensors, one file or sharded): dense deltas, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource, Parameter, PluginConfig
from next_core.sources.folders import (
    Shifts,
    find_step_folders,
    holds,
    metrics_at,
    read_metrics,
)
from next_core.sources.hf_model import INDEX, SINGLE, ModelFiles


class FullModelSourceConfig(PluginConfig):
    path: Path = Field(description="Folder that holds the folders of the steps")
    backbone: Path | None = Field(None, description="The base model's folder; without it, step 0 must be there")


class FullModelSource(CheckpointSource):
    """``checkpoint-N/model.safetensors`` or its shards; only matrices (two dimensions) are extrapolated."""

    name = "full-model"
    config_class = FullModelSourceConfig

    def __init__(self, config: FullModelSourceConfig) -> None:
        super().__init__(config)
        self._backbone = ModelFiles(config.backbone) if config.backbone is not None else None
        self._models: dict[int, ModelFiles] = {}
        self._shifts = Shifts(config.path)
        self._metrics: dict[int, dict[str, float]] | None = None
        self.refresh()

    @classmethod
    def detect(cls, path: Path) -> bool:
        return holds(path, (SINGLE, INDEX))

    def refresh(self) -> None:
        """Take in the checkpoints that were written since the folder was opened."""
        folders = find_step_folders(self.config.path, known=self._models)
        models = {step: self._models.get(step) or ModelFiles(folder) for step, folder in folders.items()}
        first = next(iter(models.values()), None)
        for step, model in models.items():
            if first is not None and model.shapes != first.shapes:
                different = sorted(set(model.shapes.items()) ^ set(first.shapes.items()))[0]
                raise CheckpointError(f"{folders[step]}: '{different[0]}' differs in name or shape from the first step")
        if first is not None and self._backbone is not None:
            self._backbone.require({k: v for k, v in first.shapes.items() if len(v) == 2})
        self._models = models
        self._shifts.refresh()
        self._metrics = None

    @property
    def steps(self) -> tuple[int, ...]:
        # Without a backbone folder, step 0 is the backbone and not an observation.
        first = max(self._shifts.start, 0 if self._backbone is not None else 1)
        return tuple(step for step in self._models if step >= first)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(name, (shape[0], shape[1])) for name, shape in sorted(self._shapes().items()) if len(shape) == 2
        )

    @property
    def skipped(self) -> Mapping[str, str]:
        return {name: "not a matrix; stays as trained" for name, shape in self._shapes().items() if len(shape) != 2}

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        first = next(iter(self._models.values()), None)
        return {} if first is None else first.shapes

    def weight(self, name: str, step: int | None, rows: slice | None = None) -> Tensor:
        """The weight at a step, or of the backbone (None), or some rows of it, with the later jumps counted in."""
        if step is None and self._backbone is not None:
            value = self._backbone.read(name, rows)
        elif (step or 0) in self._models:
            value = self._models[step or 0].read(name, rows)
        else:
            what = "backbone; pass --backbone" if step is None else f"step {step}; observed steps: {self.steps}"
            raise CheckpointError(f"{self.config.path} has no {what}")
        for shift in self._shifts.since(step or 0):
            value = shift.added(value, name, rows)
        return value

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        return self.weight(name, step, rows).double() - self.weight(name, since, rows).double()

    def delta(self, name: str, step: int, since: int | None = None) -> Tensor:
        return self.weight(name, step).double() - self.weight(name, since).double()

    def stored(self, key: str, step: int) -> Tensor:
        """One matrix of a checkpoint, with the jump made right after it."""
        value = self._models[step].read(key)
        for shift in self._shifts.made_after(step):
            value = shift.added(value, key)
        return value

    def position(self, name: str, step: int) -> Tensor:
        begin = self._models.get(0) if self._backbone is None else self._backbone
        if begin is None:
            raise CheckpointError(f"{self.config.path} has no backbone; pass --backbone")
        return self.weight(name, step).double() - begin.read(name).double()

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        if self._metrics is None:
            self._metrics = read_metrics({step: model.folder for step, model in self._models.items()})
        return metrics_at(self._metrics, step, since)

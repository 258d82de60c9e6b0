"""Full-parameter checkpoints (one file or sharded): dense deltas, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.interfaces import CheckpointSource
from next_core.sources.deepspeed import reader
from next_core.sources.hf_model import ModelFiles
from next_core.sources.layouts import MODEL_FILES, MODEL_PICKLES, holds
from next_core.sources.mismatch import mismatch
from next_core.sources.run_folder import DiskSourceConfig, RunFolder
from next_core.sources.tied_weights import tied_names
from next_core.types import Parameter


class FullModelSourceConfig(DiskSourceConfig):
    backbone: Path | None = Field(None, description="The base model's folder; without it, step 0 must be there")


class FullModelSource(CheckpointSource):
    """``checkpoint-N/model.safetensors`` or its shards; only matrices (two dimensions) are extrapolated."""

    name = "full-model"
    config_class = FullModelSourceConfig

    def __init__(self, config: FullModelSourceConfig) -> None:
        super().__init__(config)
        self._tied: Mapping[str, str] = {}
        allow = config.allow_pickle
        self._backbone = ModelFiles(config.backbone, allow) if config.backbone is not None else None
        through = reader(config.masters, allow)
        self._run = RunFolder(config, lambda folder, step: ModelFiles(folder, allow, through(folder, step)))
        self._shifts = self._run.shifts
        self.refresh()

    @classmethod
    def detect(cls, path: Path, folders: Sequence[Path] = ()) -> bool:
        return holds(path, (*MODEL_FILES, *MODEL_PICKLES), folders)

    def __reduce__(self) -> tuple[type[FullModelSource], tuple[FullModelSourceConfig]]:
        return type(self), (self.config,)  # another process opens the folder for itself

    def refresh(self) -> None:
        """Take in the checkpoints that were written since the folder was opened."""
        self._run.refresh(self._check)

    def _check(self, models: Mapping[int, ModelFiles]) -> None:
        """Raise ``CheckpointError`` unless all models are of one run."""
        backbone = [] if self._backbone is None else [self._backbone]
        tied = tied_names([*backbone, *models.values()]) if models else None
        if tied is not None:
            for model in (*backbone, *models.values()):
                model.call_one(*tied)
            self._tied = dict([tied])
        first_step, first = next(iter(models.items()), (0, None))
        for model in models.values():
            different = mismatch(first.shapes, model.shapes, f"step {first_step}") if first is not None else None
            if different is not None:
                raise CheckpointError(f"{model.folder}: {different}")
        if first is not None and self._backbone is not None:
            self._backbone.require({k: v for k, v in first.shapes.items() if len(v) == 2})

    @property
    def stores_full_weights(self) -> bool:
        return True

    @property
    def tied(self) -> Mapping[str, str]:
        return self._tied

    @property
    def naming(self) -> str:
        """How the folders of the steps are named, with N for the step."""
        return self._run.naming

    @property
    def notes(self) -> Sequence[str]:
        tied = [f"{head} and {one} are one parameter, read once as {one}" for head, one in self.tied.items()]
        return [*self._run.notes(), *tied]

    @property
    def steps(self) -> tuple[int, ...]:
        # Step 0, where it was kept, is where RL began and not an observation of it.
        return tuple(step for step in self._models if step > 0 and step >= self._shifts.start)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        skipped = self.skipped
        shapes = {name: shape for name, shape in sorted(self._shapes().items()) if name not in skipped}
        return tuple(Parameter(name, (rows, columns)) for name, (rows, columns) in shapes.items())

    @property
    def skipped(self) -> Mapping[str, str]:
        found = {name: "not a matrix; stays as trained" for name, shape in self._shapes().items() if len(shape) != 2}
        found |= {name: "has no values" for name, shape in self._shapes().items() if len(shape) == 2 and 0 in shape}
        for name in self._shapes().keys() - found.keys():
            if not self.precision(name).is_floating_point:
                found[name] = "stored as integers; stays as it is"
        return found

    @property
    def _models(self) -> Mapping[int, ModelFiles]:
        return self._run.checkpoints

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        first = next(iter(self._models.values()), None)
        return {} if first is None else first.shapes

    def _start(self) -> ModelFiles | None:
        """Where RL began: step 0 where it was kept, else the backbone."""
        return self._models.get(0) or self._backbone

    def model(self, step: int | None) -> ModelFiles:
        """The files of a step, or of where RL began (None): ``raw`` reads from them what is stored, unchecked."""
        model = self._start() if step is None else self._models.get(step)
        if model is None:
            what = "backbone; pass --backbone" if step is None else f"step {step}; observed steps: {self.steps}"
            raise CheckpointError(f"{self.config.path} has no {what}")
        return model

    def precision(self, name: str) -> torch.dtype:
        newest = next(reversed(self._run.checkpoints.values()), None)
        return torch.float32 if newest is None else newest.dtype(name)

    def fingerprint(self, step: int | None) -> str | None:
        return self._run.digest(self.model(step), step or 0)

    def weight(self, name: str, step: int | None, rows: slice | None = None) -> Tensor:
        """The weight at a step or where RL began (None), or some rows of it, with the later jumps counted in."""
        value = self.model(step).read(name, rows)
        for shift in self._shifts.since(step or 0):
            value = shift.added(value, name, rows)
        return value

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        return self.weight(name, step, rows) - self.weight(name, since, rows)

    def delta(self, name: str, step: int, since: int | None = None) -> Tensor:
        # In fp32: the difference of two neighbours is exact there, and twice as fast to use as in fp64.
        return self.weight(name, step) - self.weight(name, since)

    def stored(self, key: str, step: int) -> Tensor:
        """One matrix of a checkpoint, with the jump made right after it."""
        value = self.model(step).read(key)
        for shift in self._shifts.made_after(step):
            value = shift.added(value, key)
        return value

    def position(self, name: str, step: int) -> Tensor:
        on_disk = self._backbone or self.model(None)  # which need not be where RL began
        return self.weight(name, step).double() - on_disk.read(name)

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        return self._run.logged_metrics()

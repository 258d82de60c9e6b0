"""The interface of checkpoint sources: the ordered steps of one run, its parameters and their deltas.

Notation: a weight matrix W is (m, n); checkpoints were observed at steps t_1 < ... < t_T; W_0 is the backbone;
G_t = W_t - W_0 is the global delta, L_t = W_t - W_{t-1} the local delta (since the previous checkpoint).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.mathematics.low_rank import LowRank, dense
from next_core.types import LoraFactors, Parameter, Plugin

WARNING = "warning: "
"""How a source's note begins that the user should act on."""


class StoredModel(Protocol):
    """The whole weights of one checkpoint as its files store them, read one tensor at a time."""

    @property
    def folder(self) -> Path:
        """The folder of the files."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every stored tensor by name."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision a tensor is stored in."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, in at least fp32. Raises ``CheckpointError`` for NaN or Inf."""

    def raw(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, as stored; its values are not checked."""


class CheckpointSource(Plugin):
    """The checkpoints of one run, read lazily.

    Opening a run finds incomplete and damaged checkpoints and raises ``CheckpointError`` with their names.
    """

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Return whether a folder holds checkpoints of this layout."""
        return False

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The observed RL steps, ascending."""

    @property
    def origin(self) -> int:
        """The step that deltas without ``since`` count from."""
        return 0

    @property
    def begins(self) -> int:
        """The step before which the run has deleted its checkpoints (``keep: needed``); 0 if it has deleted none."""
        return 0

    @property
    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The weight matrices of the run; they are the same in every checkpoint."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Parameters that are stored but cannot be extrapolated, with the reason for each."""
        return {}

    @property
    def naming(self) -> str:
        """The name of a checkpoint folder, with N for the step; empty where there are no folders."""
        return ""

    @property
    def notes(self) -> Sequence[str]:
        """Facts for the user about the folder: missing steps, damaged folders that were skipped, ..."""
        return ()

    @property
    def trained_weights(self) -> int:
        """The number of weights that the run trains, those included that are no matrices and cannot be extrapolated."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    def precision(self, name: str) -> torch.dtype:
        """Return the precision a parameter is stored in."""
        return torch.float32

    def fingerprint(self, step: int | None) -> str | None:
        """Return a digest of all that decides the weights at a step (None: where RL began), later jumps included.

        Results are cached under it. A source without one, such as tensors in memory, returns None: nothing is cached.
        """
        return None

    @property
    def stores_full_weights(self) -> bool:
        """Whether checkpoints hold whole weights, read by ``model`` and ``weight``, instead of LoRA factors."""
        return False

    @property
    def applier(self) -> str:
        """The name of the applier that writes such a run, unless another is chosen."""
        return "merged-model" if self.stores_full_weights else "peft-adapter"

    @property
    def tied(self) -> Mapping[str, str]:
        """Output heads that share the input embedding's weights, with the name of that embedding."""
        return {}

    def model(self, step: int | None) -> StoredModel:
        """Return the stored weights of a step, or of where RL began (None), without the jumps made since.

        Raises ``CheckpointError`` where the step is not there, or the run does not store full weights.
        """
        self._refuse_full_weights()

    def weight(self, name: str, step: int | None, rows: slice | None = None) -> Tensor:
        """Return a weight at a step or where RL began (None), or some of its rows, with later jumps added.

        Raises ``CheckpointError`` as ``model`` does.
        """
        self._refuse_full_weights()

    def weight_as_stored(self, name: str, step: int | None, rows: slice | None = None) -> Tensor:
        """Return what ``weight`` does, in the precision that is at hand and without looking for NaN: for speed."""
        return self.weight(name, step, rows)

    def _refuse_full_weights(self) -> NoReturn:
        raise CheckpointError(
            f"the checkpoints of this run ({self.name}) hold no full weights; open checkpoints of whole models",
            kind="checkpoint-no-full-weights",
        )

    def as_of(self, step: int) -> CheckpointSource:
        """Return the run as it stood when ``step`` was reached: only jumps made before then are counted.

        Later checkpoints are still there. Returns the same source where no later jump changes a delta.
        """
        return self

    @abstractmethod
    def delta(self, name: str, step: int, since: int | None = None) -> LowRank | Tensor:
        """Return W_step - W_since of one parameter: a ``LowRank`` for LoRA runs, else a dense (m, n) tensor.

        ``since=None`` is where RL began: step 0 if the run kept it, else the backbone. Raises ``CheckpointError`` for
        values that are not finite and for unknown steps.
        """

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        """Return some rows of a dense delta. Override it where rows can be read alone: that bounds memory."""
        return dense(self.delta(name, step, since))[rows]

    def position(self, name: str, step: int) -> LowRank | Tensor:
        """Return W_step minus the backbone on disk, jumps included; ``delta`` excludes them."""
        return self.delta(name, step)

    def factors(self, name: str, step: int) -> LoraFactors | None:
        """Return the LoRA factors of one parameter at one step; None where the run is not LoRA."""
        return None

    def start(self, name: str) -> LoraFactors | None:
        """Return the adapter that RL began with, from which ``delta`` counts by default; None if it was zero."""
        return None

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        """Return everything the trainer logged, by RL step; empty when there are no logs."""
        return {}

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        """Return the last metrics logged at or before ``step`` and after ``since``; empty when there are none."""
        logged = self.logged_metrics()
        past = [at for at in logged if at <= step and (since is None or at > since)]
        return logged[max(past)] if past else {}

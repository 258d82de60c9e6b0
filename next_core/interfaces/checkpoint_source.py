"""What a source of checkpoints promises: the ordered steps of one run, its parameters and their deltas.

Notation: a matrix W is (m, n); T checkpoints were observed at steps t_1 < ... < t_T; W_0 is the backbone;
G_t = W_t - W_0 is the global delta, L_t = W_t - W_{t-1} the local one (since the previous checkpoint).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from next_core.errors import CheckpointError
from next_core.mathematics.low_rank import LowRank, dense
from next_core.types import LoraFactors, Parameter, Plugin


class StoredModel(Protocol):
    """The whole weights of one checkpoint as its files store them, read one tensor at a time."""

    @property
    def folder(self) -> Path:
        """Where the files lie."""

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
    """The checkpoints of one run, read lazily. Incomplete or damaged ones are found on opening, and named."""

    @classmethod
    def detect(cls, path: Path) -> bool:
        """Whether a folder holds checkpoints of this layout."""
        return False

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The observed RL steps, ascending."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The weight matrices of the run, the same in every checkpoint."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Parameters that are stored but cannot be extrapolated, each with the reason."""
        return {}

    @property
    def naming(self) -> str:
        """How the folders of the steps are named, with N for the step; empty for what is not in folders."""
        return ""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of the folder: steps that are missing, damaged folders that were left out, ..."""
        return ()

    def precision(self, name: str) -> torch.dtype:
        """The precision a parameter's checkpoints are stored in."""
        return torch.float32

    def fingerprint(self, step: int | None) -> str | None:
        """A digest of all that decides the weights at a step (None: where RL began), jumps since included.

        None where it cannot be told, as for what lives in memory alone: nothing computed from it is cached then.
        """
        return None

    @property
    def stores_full_weights(self) -> bool:
        """Whether checkpoints hold whole weights, read by ``model`` and ``weight``, instead of LoRA factors."""
        return False

    @property
    def tied(self) -> Mapping[str, str]:
        """Maps an output head that is one parameter with the input embedding to the name of that embedding."""
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
        """W_step - W_since of one parameter; ``since=None`` is where RL began: the backbone, or step 0 if it was kept.

        Low-rank (``LowRank``) where the run is LoRA, else a dense (m, n) tensor. Raises ``CheckpointError`` for
        values that are not finite.
        """

    def delta_rows(self, name: str, rows: slice, step: int, since: int | None = None) -> Tensor:
        """Some rows of a dense delta; a source that can read them alone should, to bound the memory of a sweep."""
        return dense(self.delta(name, step, since))[rows]

    def position(self, name: str, step: int) -> LowRank | Tensor:
        """W_step minus the backbone as it is on disk, every jump included: where the run stands, not what RL did."""
        return self.delta(name, step)

    def factors(self, name: str, step: int) -> LoraFactors | None:
        """The LoRA factors of one parameter at one step; None where the run is not LoRA."""
        return None

    def start(self, name: str) -> LoraFactors | None:
        """The adapter that RL began with, where it added anything: ``delta`` without ``since`` counts from it."""
        return None

    def logged_metrics(self) -> Mapping[int, Mapping[str, float]]:
        """Return everything the trainer logged, by RL step; empty when there are no logs."""
        return {}

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        """Return the last metrics logged at or before ``step`` and after ``since``; empty when there are none."""
        logged = self.logged_metrics()
        past = [at for at in logged if at <= step and (since is None or at > since)]
        return logged[max(past)] if past else {}

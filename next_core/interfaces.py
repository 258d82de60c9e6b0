"""What a source, a compressor, an applier and a reward promise to the engine, and the values they exchange.

Notation of the docstrings: a matrix W is (m, n); T checkpoints were observed at steps t_1 < ... < t_T; W_0 is the
backbone; G_t = W_t - W_0 is the global delta, L_t = W_t - W_{t-1} the local one (since the previous checkpoint).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank, dense
from next_core.types import Anchor, LoraFactors, Parameter, Plugin, Progress, Space, Span


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

    def metrics(self, step: int, since: int | None = None) -> Mapping[str, float]:
        """The trainer's last metrics logged at or before ``step`` and after ``since``; empty when there are none."""
        return {}


class Compressor(Plugin):
    """Deltas of one shape in, their leading singular triplets out."""

    @abstractmethod
    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        """N deltas of shape (m, n) -> ``Factors`` with a leading dimension N: U (N, m, k), S (N, k), V (N, n, k).

        Zero deltas give zero columns, never arbitrary unit vectors.
        """

    def compress_trajectory(
        self, path: LoraTrajectory, spans: Sequence[Span], rank: int, spectrum: bool = False
    ) -> Factors:
        """The same for several deltas of one LoRA matrix, which share their factors; leading dimension len(spans).

        ``spectrum`` asks for the sum of all singular values (``Factors.nuclear``), which may otherwise be None.
        """
        return self.compress([path.delta(*span) for span in spans], rank)


@dataclass(frozen=True)
class CoefficientUpdate:
    """A weight_delta over the observed checkpoints: sum_i weights[t_i] G_{t_i}, counted from the anchor.

    In ``space="merged"`` that sum is taken of the deltas themselves. In ``space="factors"`` (LoRA only) the trained
    A and B are moved each by the same sum of their own past values; step 0 (the adapter as initialised, B = 0) takes
    what is missing to weights that sum to zero.
    """

    weights: Mapping[int, float]
    space: Space = "merged"


@dataclass(frozen=True)
class LowRankUpdate:
    """A weight_delta given as a low-rank matrix (m, n), counted from the anchor."""

    matrix: LowRank


Update = CoefficientUpdate | LowRankUpdate


@dataclass(frozen=True)
class Prediction:
    """Where a predictor says the weights are going.

    The updates count from ``anchor`` (the newest checkpoint, or the backbone), and only an applier resolves it: a
    cumulative prediction can never be added twice. A parameter without an update stays where it is, for the
    reason in ``abstained``; ``abstention`` says why the predictor declines to predict anything.
    """

    source: CheckpointSource
    step: int
    horizon: int
    anchor: Anchor = "newest"
    updates: Mapping[str, Update] = field(default_factory=dict)
    confidence: Mapping[str, float] = field(default_factory=dict)
    """Per parameter a factor on alpha, finite and 0 or more; 1 where it is not given."""
    abstained: Mapping[str, str] = field(default_factory=dict)
    abstention: str | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def weight(self, name: str) -> float:
        """The factor on alpha of one parameter."""
        return self.confidence.get(name, 1.0)


class Applied(ABC):
    """Weights that were changed; ``rollback`` puts back exactly what was there."""

    @abstractmethod
    def rollback(self) -> None:
        """Restore the state from before the apply, bit for bit."""


class WeightApplier(Plugin):
    """Resolves the anchor, scales by alpha, writes. All is computed and validated before anything changes."""

    writes_folders: ClassVar[bool] = True
    """Whether ``apply`` writes a folder; False for an applier that changes a model in memory."""
    progress: Progress | None = None

    def report_progress(self, what: str, done: int, total: int) -> None:
        """Report to ``progress``, where there is one."""
        if self.progress is not None:
            self.progress(what, done, total)

    @abstractmethod
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> Applied:
        """Write W_T + alpha * confidence * (prediction - W_T) to ``out``: a folder, or a live model."""


class Reward(Plugin):
    """A verifiable reward, called as TRL calls its reward functions."""

    @abstractmethod
    def __call__(self, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
        """One reward for each completion; ``answer`` and ``columns`` are the data set's columns."""

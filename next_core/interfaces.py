"""What a part of the system promises to the others. Abstract classes and the values they exchange, nothing else.

Notation of the docstrings: a matrix W is (m, n); T checkpoints were observed at steps t_1 < ... < t_T; W_0 is the
backbone; G_t = W_t - W_0 is the global delta, L_t = W_t - W_{t-1} the local one (the step before it on the grid).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from next_core.lowrank import Factors, LowRank, dense

if TYPE_CHECKING:
    from pathlib import Path

    from next_core.config import RunConfig
    from next_core.history import History
    from next_core.lora_path import LoraPath

Space = Literal["factors", "merged"]
Anchor = Literal["newest", "backbone"]
Span = tuple[int, int | None]
"""A delta: up to a step, since another; None is where RL began."""
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called by long steps so that somebody can show it."""


Needs = Literal["global", "local", "target", "gram", "metrics"]


class PluginConfig(BaseModel):
    """Base of every plug-in's settings: immutable; an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Plugin(ABC):
    """Anything that is chosen by name in a config. A class carries its own name and config class."""

    name: ClassVar[str]
    config_class: ClassVar[type[PluginConfig]] = PluginConfig

    def __init__(self, config: PluginConfig | None = None) -> None:
        self.config: Any = config if config is not None else self.config_class()


@dataclass(frozen=True)
class Work:
    """FLOPs of thin fp64 products, bytes to or from memory and disk, FLOPs of large fp32 products."""

    flops: float = 0.0
    bytes: float = 0.0
    single_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.single_flops + other.single_flops)

    def times(self, count: float) -> Work:
        """So many times as much."""
        return Work(self.flops * count, self.bytes * count, self.single_flops * count)


@dataclass(frozen=True)
class Parameter:
    """A weight matrix of the run: its name in the Hugging Face model, its shape (m, n), and its LoRA rank r."""

    name: str
    shape: tuple[int, int]
    rank: int | None = None

    @property
    def kind(self) -> Literal["lora", "dense"]:
        """How it is stored: as factors, or as the whole matrix."""
        return "dense" if self.rank is None else "lora"


@dataclass(frozen=True)
class LoraFactors:
    """One LoRA adapter of one matrix: the delta is ``scaling * B @ A``; A is (r, n), B is (m, r)."""

    A: Tensor
    B: Tensor
    scaling: float


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

    def compress_path(self, path: LoraPath, spans: Sequence[Span], rank: int, spectrum: bool = False) -> Factors:
        """The same for several deltas of one LoRA matrix, which share their factors; leading dimension len(spans).

        ``spectrum`` asks for the sum of all singular values (``Factors.nuclear``), which may otherwise be None.
        """
        return self.compress([path.delta(*span) for span in spans], rank)


@dataclass(frozen=True)
class CoefficientUpdate:
    """A displacement over the observed checkpoints: sum_i weights[t_i] G_{t_i}, counted from the anchor.

    In ``space="merged"`` that sum is taken of the deltas themselves. In ``space="factors"`` (LoRA only) the trained
    A and B are moved each by the same sum of their own past values; step 0 (the adapter as initialised, B = 0) takes
    what is missing to weights that sum to zero.
    """

    weights: Mapping[int, float]
    space: Space = "merged"


@dataclass(frozen=True)
class LowRankUpdate:
    """A displacement given as a low-rank matrix (m, n), counted from the anchor."""

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


class TrajectoryPredictor(Plugin):
    """Fits the observed trajectory and extrapolates it by ``horizon`` RL steps."""

    requires: ClassVar[frozenset[Needs]] = frozenset()
    """What it reads of a history: rank-k components of these kinds of deltas, inner products, logged metrics."""
    shares: ClassVar[bool] = False
    """Whether matrices learn from one another (one network for all) or each stands alone."""
    made_for: ClassVar[Mapping[Literal["schedule", "guards"], Mapping[str, Any]]] = {}
    """The schedule and the guards it is made for: what a run's config leaves out of them is taken from here."""
    progress: Progress | None = None

    def lacks(self, steps: Sequence[int], horizon: int) -> str | None:
        """Why checkpoints of these steps cannot carry a prediction, whatever is in them; None where they can.

        Asked before a run begins, so that a schedule on which a predictor can never act is refused at once.
        """
        return None

    def work(self, shapes: Mapping[str, tuple[int, int]], steps: Sequence[int], horizon: int, rank: int) -> Work:
        """What fitting takes once the deltas are decomposed, for ``next-core plan``; next to nothing by default."""
        return Work()

    @abstractmethod
    def fit(self, history: History) -> Self:
        """Take the history. What depends on the horizon may be fitted on the first ``predict`` of it."""

    @abstractmethod
    def predict(self, horizon: int) -> Prediction:
        """The prediction ``horizon`` RL steps past the newest checkpoint, or an abstention with its reason.

        Raises ``ConfigError`` for a horizon below 1, and ``NextCoreError`` before ``fit``.
        """


class Applied(ABC):
    """Weights that were changed; ``rollback`` puts back exactly what was there."""

    @abstractmethod
    def rollback(self) -> None:
        """Restore the state from before the apply, bit for bit."""


class WeightApplier(Plugin):
    """Resolves the anchor, scales by alpha, writes. All is computed and validated before anything changes."""

    progress: Progress | None = None

    def told(self, what: str, done: int, total: int) -> None:
        """Report to ``progress``, where there is one."""
        if self.progress is not None:
            self.progress(what, done, total)

    @abstractmethod
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> Applied:
        """Write W_T + alpha * confidence * (prediction - W_T) to ``out``: a folder, or a live model."""


class Backend(Plugin):
    """A trainer, as the predict-extend cycle sees it."""

    in_process: ClassVar[bool] = True
    """True: one call of ``train`` reports every step. False: ``train`` is called once per segment."""
    exact_resume: ClassVar[bool] = False
    """Whether a resumed run ends, on a CPU, bit for bit where the run that was not interrupted does."""

    @abstractmethod
    def prepare(self, run: RunConfig, out: Path, resume: bool = False) -> int:
        """Build the trainer of a run config, working in ``out``. Returns the step to go on from, 0 for a new run.

        Raises ``ConfigError`` or ``BackendError`` for what the trainer cannot do.
        """

    def start(self) -> None:
        """Start a trainer that is a process of its own, once after ``prepare``: it may take minutes."""

    @abstractmethod
    def train(self, until: int, step_ended: Callable[[int], None]) -> None:
        """Train up to and including RL step ``until``, calling ``step_ended(step)`` after each step it can report."""

    def stop(self) -> None:
        """Let ``train`` return early: at the next step that a resumed run goes on from as if it had not ended there.

        Asked for at the end of a step, by an in-process trainer's user; one that cannot is ended at once.
        """
        raise KeyboardInterrupt

    @abstractmethod
    def observe(self, step: int) -> None:
        """Make the weights of the step that just ended available as a checkpoint of ``source()``."""

    @abstractmethod
    def source(self) -> CheckpointSource:
        """The checkpoints so far, shifted by the jumps that were made: what RL did, not what we did."""

    @abstractmethod
    def extend(self, prediction: Prediction, alpha: float, keep: bool = False) -> Applied:
        """Give the trainer the extrapolated weights, at a point where it holds no roll-outs of the old ones.

        What it returns puts weights and optimizer state back, also after further steps; with ``keep`` a resumed run
        can do so too (``standing``).
        """

    @abstractmethod
    def rollback(self, applied: Applied, step: int) -> None:
        """Put back what was there before a jump, after ``step`` ended.

        At the jump's own step it is as if it had not been made; later, the checkpoints since are of a path that was
        left, and the history starts anew at ``step``.
        """

    def standing(self, step: int) -> Applied | None:
        """The jump made after ``step``, as a resumed run finds it; None where its undoing was not kept."""
        return None

    def evaluate(self, split: Literal["validation", "test"] = "validation") -> float | None:
        """Accuracy in [0, 1] on held-out prompts; None where there is nothing to measure with."""
        return None

    def accuracies(self, split: Literal["validation", "test"]) -> Mapping[str, float]:
        """The same by the way of answering, ``sampled`` or ``greedy``; empty where there is nothing to measure with."""
        found = self.evaluate(split)
        return {} if found is None else {"sampled": found}

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how the run was observed, such as the precision of its checkpoints."""
        return ()

    def close(self) -> None:
        """End what still runs, when the run is over or has failed; before ``prepare``, and again, it does nothing."""

    def describe(self, run: RunConfig, out: Path) -> Mapping[str, Any]:
        """Facts for a dry run as plain values, such as the command line that would be started; nothing is started."""
        return {}


class Reward(Plugin):
    """A verifiable reward, called as TRL calls its reward functions."""

    @abstractmethod
    def __call__(self, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
        """One reward for each completion; ``answer`` and ``columns`` are the data set's columns."""


__all__ = [
    "Anchor",
    "Applied",
    "Backend",
    "CheckpointSource",
    "CoefficientUpdate",
    "Compressor",
    "LoraFactors",
    "LowRankUpdate",
    "Needs",
    "Parameter",
    "Plugin",
    "PluginConfig",
    "Prediction",
    "Progress",
    "Reward",
    "Space",
    "Span",
    "TrajectoryPredictor",
    "Update",
    "WeightApplier",
    "Work",
]

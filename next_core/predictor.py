"""What a trajectory predictor promises, and two short ways to write one that treats each matrix alone.

A decorated function (``matrix_predictor``) is enough when a matrix's own history decides; subclass
``PerMatrixPredictor`` when something must be computed once for the whole run (``prepare``). Both handle frozen
matrices, abstentions and values that are not finite.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import torch
from pydantic import Field

from next_core.errors import CheckpointError, ConfigError, NextCoreError, PluginError
from next_core.history.history import History, MatrixHistory
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.settings import Settings
from next_core.types import Anchor, Plugin, Progress, Space

Config = TypeVar("Config", bound=Settings)


Needs = Literal["global", "local", "target", "gram", "metrics"]


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
class Abstain:
    """What a predictor answers in place of an update: the matrix stays where it is, for this reason."""

    reason: str


Outcome = Update | Abstain | tuple[Update, float]
"""An update, one with its confidence (a factor on alpha), or an abstention."""


class CoefficientConfig(Settings):
    """Settings of every predictor whose updates are coefficients over the observed checkpoints."""

    space: Space = Field(
        "merged",
        description="What the coefficients weigh: the LoRA factors A and B themselves (factors), or the weight "
        "matrices (merged). A run without LoRA has no factors: both mean merged there",
    )


class TrajectoryPredictor(Plugin):
    """Fits the observed trajectory and extrapolates it by ``horizon`` RL steps."""

    requires: ClassVar[frozenset[Needs]] = frozenset()
    """What it reads of a history: rank-k components of these kinds of deltas, inner products, logged metrics."""
    shares: ClassVar[bool] = False
    """Whether matrices learn from one another (one network for all) or each stands alone."""
    recommended: ClassVar[Mapping[Literal["schedule", "guards"], Mapping[str, Any]]] = {}
    """The schedule and the guards it is made for: what a run's config leaves out of them is taken from here."""
    progress: Progress | None = None

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
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


class PerMatrixPredictor(TrajectoryPredictor):
    """Base of predictors that stand alone on each matrix: write ``predict_matrix``, and ``prepare`` if needed."""

    def __init__(self, config: Settings | None = None, /, **fields: Any) -> None:
        super().__init__(config, **fields)
        self._history: History | None = None
        self.diagnostics: dict[str, float] = {}
        """Figures for ``Prediction.diagnostics``; ``prepare`` fills it."""

    @property
    def anchor(self) -> Anchor:
        """What the updates count from."""
        return "newest"

    @property
    def history(self) -> History:
        """The fitted history. Raises ``NextCoreError`` before ``fit``."""
        if self._history is None:
            raise NextCoreError(f"{self.name}: call fit(history) before predict")
        return self._history

    def fit(self, history: History) -> Self:
        self._history = history
        return self

    def prepare(self, horizon: int) -> Abstain | None:
        """Once for each ``predict``, before any matrix: what the whole run decides."""
        return None

    @abstractmethod
    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        """One matrix that moves, ``horizon`` >= 1 RL steps past its newest checkpoint."""

    def predict(self, horizon: int) -> Prediction:
        """See ``TrajectoryPredictor``. Raises ``ConfigError`` for a horizon below 1."""
        if horizon < 1:
            raise ConfigError(f"{self.name}: horizon is counted in RL steps ahead, at least 1 (got {horizon})")
        history, self.diagnostics = self.history, {}
        abstained = dict(history.frozen)
        updates: dict[str, Update] = {}
        confidence: dict[str, float] = {}
        run_wide = self._prepare(horizon)
        reasons: list[str] = []
        for name in history.names if run_wide is None else ():
            outcome = self._checked(name, self.predict_matrix(history.matrix(name), horizon))
            if isinstance(outcome, Abstain):
                abstained[name] = outcome.reason
                reasons.append(outcome.reason)
                continue
            updates[name], weight = outcome
            if weight != 1.0:
                confidence[name] = weight
        if reasons and not updates:
            run_wide = Abstain(_commonest(reasons))
        return Prediction(
            source=history.source,
            step=history.newest,
            horizon=horizon,
            anchor=self.anchor,
            updates=updates,
            confidence=confidence,
            abstained=abstained,
            abstention=None if run_wide is None else run_wide.reason,
            diagnostics=dict(self.diagnostics),
        )

    def _prepare(self, horizon: int) -> Abstain | None:
        history = self.history
        if not history.names:
            since = f"step {history.steps[-2]}" if len(history.steps) > 1 else "the backbone"
            return Abstain(f"no matrix moved since {since}: did training change the weights?")
        reason = self.why_not(history.steps, horizon)
        return self.prepare(horizon) if reason is None else Abstain(reason)

    def _checked(self, name: str, outcome: Outcome) -> tuple[Update, float] | Abstain:
        """The outcome as (update, confidence), or the reason why it cannot be used."""
        if isinstance(outcome, Abstain):
            return outcome
        update, confidence = outcome if isinstance(outcome, tuple) else (outcome, 1.0)
        if not isinstance(update, CoefficientUpdate | LowRankUpdate):
            raise PluginError(
                f"predictor '{self.name}' answered {type(update).__name__} for '{name}'; "
                "return an update, (update, confidence) or Abstain(reason)"
            )
        if not (_finite(update) and math.isfinite(confidence)):
            return Abstain(f"the prediction of '{name}' is not finite")
        if isinstance(update, CoefficientUpdate) and update.space == "factors":
            return self._in_factor_space(name, update, confidence)
        return update, confidence

    def _in_factor_space(
        self, name: str, update: CoefficientUpdate, confidence: float
    ) -> tuple[Update, float] | Abstain:
        source = self.history.source
        if self.history.ranks[name] is None:
            return dataclasses.replace(update, space="merged"), confidence
        weights = update.weights.values()
        missing = sum(weights) - (1.0 if self.anchor == "backbone" else 0.0)
        if abs(missing) > 1e-12 * (1.0 + sum(abs(weight) for weight in weights)):
            # Step 0 takes what is missing to zero, so the adapter as initialised must be readable.
            try:
                source.factors(name, 0)
            except CheckpointError:
                return Abstain(
                    "space: factors counts from the adapter as it was initialised, and the run kept no checkpoint of "
                    "step 0; keep one, or set space: merged"
                )
        return update, confidence


def matrix_predictor(
    name: str,
    *,
    config: type[Config] = Settings,  # type: ignore[assignment]
    requires: Iterable[Needs] = (),
    anchor: Anchor | Callable[[Config], Anchor] = "newest",
) -> Callable[[Callable[[MatrixHistory, int, Config], Outcome]], type[PerMatrixPredictor]]:
    """Make a predictor class of a function of one matrix, the horizon and the config::

        @matrix_predictor("last-step", requires={"gram"})
        def last_step(matrix, horizon, config):
            if len(matrix.steps) < 2:
                return Abstain("needs two checkpoints")
            before, newest = matrix.steps[-2:]
            c = horizon / (newest - before)
            return CoefficientUpdate({newest: c, before: -c})

    ``anchor`` says what the updates count from; give a function of the config where a setting decides. The result is
    registered as any class is: ``registry().add(last_step)``, or by a ``register_predictors`` hook.
    """
    if not callable(anchor) and anchor not in get_args(Anchor):
        raise PluginError(f"predictor '{name}': anchor is {anchor!r}; known: {', '.join(get_args(Anchor))}")
    plugin_name, needs = name, frozenset(requires)

    def decorate(function: Callable[[MatrixHistory, int, Config], Outcome]) -> type[PerMatrixPredictor]:
        class Decorated(PerMatrixPredictor):
            name: ClassVar[str] = plugin_name
            config_class = config
            requires = needs

            @property
            def anchor(self) -> Anchor:
                return anchor(self.config) if callable(anchor) else anchor

            def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
                return function(matrix, horizon, self.config)

        # The class takes the function's place in its module, so that "module:function" and pickle find it.
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(Decorated, attribute, getattr(function, attribute))
        return Decorated

    return decorate


def _commonest(reasons: list[str]) -> str:
    reason, count = Counter(reasons).most_common(1)[0]
    return reason if count == len(reasons) else f"every matrix abstained, most often because: {reason}"


def _finite(update: Update) -> bool:
    if isinstance(update, CoefficientUpdate):
        return all(math.isfinite(weight) for weight in update.weights.values())
    return bool(torch.isfinite(update.matrix.left).all() and torch.isfinite(update.matrix.right).all())

"""The interface of trajectory predictors, and two short ways to write one that predicts each matrix by itself.

Decorate a function with ``matrix_predictor`` where a matrix's own history is enough; subclass ``PerMatrixPredictor``
where something is computed once for the whole run (``prepare``). Both handle matrices that do not move, abstentions and
values that are not finite.
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

from next_core.errors import CheckpointError, NextCoreError, PluginError, invalid_value, wrong_answer
from next_core.history.history import History, MatrixHistory
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.settings import Settings
from next_core.types import Anchor, Plugin, Progress, Space

Config = TypeVar("Config", bound=Settings)
Needs = Literal["global", "local", "target", "gram", "metrics"]
MOST_LISTED = 8
Recommended = Mapping[Literal["schedule", "guards"], Mapping[str, Any]]


@dataclass(frozen=True)
class Work:
    """An estimate: FLOPs of thin fp64 products, bytes moved (memory and disk), FLOPs of large fp32 products."""

    flops: float = 0.0
    bytes: float = 0.0
    single_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.single_flops + other.single_flops)

    def times(self, count: float) -> Work:
        """Return the work repeated ``count`` times."""
        return Work(self.flops * count, self.bytes * count, self.single_flops * count)


@dataclass(frozen=True)
class Abstain:
    """What a predictor returns instead of an update: the matrix does not move, for this reason."""

    reason: str


Outcome = Update | Abstain | tuple[Update, float]
"""An update, an update with its confidence (a factor on alpha), or an abstention."""


class CoefficientConfig(Settings):
    """Settings of every predictor whose updates are coefficients over the observed checkpoints."""

    space: Space = Field(
        "merged",
        description="What the coefficients weigh: the LoRA factors A and B (factors), or the weight matrices (merged). "
        "Without LoRA both mean merged",
    )


class Predictor(Plugin):
    """Base of everything that a config names as ``predictor``."""

    requires: ClassVar[frozenset[Needs]] = frozenset()
    """What it reads of a history: rank-k components of these kinds of deltas, inner products, logged metrics."""
    recommended: ClassVar[Recommended] = {}
    """Recommended fields of ``schedule`` and ``guards``: the values of fields that a run's config omits."""


def described(predictor: Predictor) -> dict[str, Any]:
    """Return name and settings as plain values, for the journal."""
    return {"name": predictor.name, **predictor.config.model_dump(mode="json", fallback=str)}


class TrajectoryPredictor(Predictor):
    """A predictor: fits the observed trajectory and extrapolates it by ``horizon`` RL steps."""

    shares: ClassVar[bool] = False
    """Whether one model is shared by all matrices, so that each learns from the others."""
    progress: Progress | None = None
    _history: History | None = None

    @property
    def history(self) -> History:
        """The fitted history. Raises ``NextCoreError`` before ``fit``."""
        if self._history is None:
            raise NextCoreError(f"{self.name}: call fit(history) before predict", kind="predictor-not-fitted")
        return self._history

    @property
    def space(self) -> Space | None:
        """Where its updates move a LoRA run, known before it predicts: in the factors or the merged weights.

        None if that is not known; a merged-space jump of a trainer's model is then tried without a check beforehand.
        """
        return getattr(self.config, "space", None)

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        """Return why no prediction can be made from checkpoints of these steps, whatever they hold; None if one can.

        Called before a run begins, so that a schedule on which the predictor can never act is refused at once.
        """
        return None

    def reads_back(self, horizon: int, every: int) -> int | None:
        """Return how many steps before the newest checkpoint the oldest one lies that it reads; None: it reads all.

        ``every`` is the distance between checkpoints. It must predict the same without older
        ones, which a run with ``keep: needed`` deletes.
        """
        return None

    def work(self, shapes: Mapping[str, tuple[int, int]], steps: Sequence[int], horizon: int, rank: int) -> Work:
        """Estimate the cost of fitting, without that of decomposing deltas, for ``next-core plan``."""
        return Work()

    def fit(self, history: History) -> Self:
        """Take the history. What depends on the horizon may be fitted by the first ``predict`` with it."""
        self._history = history
        return self

    @abstractmethod
    def predict(self, horizon: int) -> Prediction:
        """Return the prediction ``horizon`` RL steps past the newest checkpoint, or an abstention with its reason.

        Raises ``ConfigError`` for a horizon below 1, and ``NextCoreError`` before ``fit``.
        """

    def check_horizon(self, horizon: int) -> None:
        """Raise ``ConfigError`` for a horizon below 1."""
        if horizon < 1:
            raise invalid_value(
                f"{self.name}: horizon is the number of RL steps to predict ahead, at least 1 (got {horizon})"
            )


class PerMatrixPredictor(TrajectoryPredictor):
    """Base of predictors that treat each matrix by itself: write ``predict_matrix``, and ``prepare`` if needed.

    ``prepare`` may add numbers to ``diagnostics``, which becomes ``Prediction.diagnostics``.
    """

    diagnostics: dict[str, float]

    @property
    def anchor(self) -> Anchor:
        """What the updates count from: the setting ``anchor`` where there is one, else the newest checkpoint."""
        anchor: Anchor = getattr(self.config, "anchor", "newest")
        return anchor

    def prepare(self, horizon: int) -> Abstain | None:
        """Compute what concerns the whole run; called once per ``predict``, before any matrix."""
        return None

    @abstractmethod
    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        """Predict one matrix that moves, ``horizon`` >= 1 RL steps past its newest checkpoint."""

    def predict(self, horizon: int) -> Prediction:
        """See ``TrajectoryPredictor``."""
        self.check_horizon(horizon)
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
            reason, count = Counter(reasons).most_common(1)[0]
            every = count == len(reasons)
            run_wide = Abstain(reason if every else f"every matrix abstained, most often because: {reason}")
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
        """Return the outcome as (update, confidence), or the reason why it cannot be used."""
        if isinstance(outcome, Abstain):
            return outcome
        update, confidence = outcome if isinstance(outcome, tuple) else (outcome, 1.0)
        if not isinstance(update, CoefficientUpdate | LowRankUpdate):
            raise wrong_answer(
                f"predictor '{self.name}' returned {type(update).__name__} for '{name}'; "
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
        if update.weights.get(0) or abs(missing) > 1e-12 * (1.0 + sum(abs(weight) for weight in weights)):
            # Step 0 gets the weight that is missing to a sum of zero, so the initial adapter must be readable.
            try:
                source.factors(name, 0)
            except CheckpointError:
                chosen = "space" in self.config_class.model_fields
                other = "set space: merged" if chosen else "choose a predictor that can move the merged weights"
                return Abstain(
                    "a move in factor space needs the initial adapter, and the run kept no checkpoint of step 0; "
                    f"name it by --start, or {other}"
                )
        return update, confidence


def matrix_predictor(
    name: str,
    *,
    config: type[Config] = Settings,  # type: ignore[assignment]
    requires: Iterable[Needs] = (),
    anchor: Anchor = "newest",
) -> Callable[[Callable[[MatrixHistory, int, Config], Outcome]], type[PerMatrixPredictor]]:
    """Make a predictor class from a function of one matrix, the horizon and the config::

        @matrix_predictor("last-step", requires={"gram"})
        def last_step(matrix, horizon, config):
            if len(matrix.steps) < 2:
                return Abstain("needs two checkpoints")
            before, newest = matrix.steps[-2:]
            c = horizon / (newest - before)
            return CoefficientUpdate({newest: c, before: -c})

    ``anchor`` is what the updates count from. Register the result like any class: ``registry().add(last_step)``, or by
    a ``register_predictors`` hook. Raises ``PluginError`` for an unknown anchor.
    """
    if anchor not in get_args(Anchor):
        message = f"predictor '{name}': anchor is {anchor!r}; known: {', '.join(get_args(Anchor))}"
        raise PluginError(message, kind="plugin-invalid")
    plugin_name, needs = name, frozenset(requires)

    def decorate(function: Callable[[MatrixHistory, int, Config], Outcome]) -> type[PerMatrixPredictor]:
        class Decorated(PerMatrixPredictor):
            name: ClassVar[str] = plugin_name
            config_class = config
            requires = needs

            @property
            def anchor(self) -> Anchor:
                return anchor

            def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
                return function(matrix, horizon, self.config)

        # The class replaces the function in its module, so that "module:function" and pickle find it.
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            setattr(Decorated, attribute, getattr(function, attribute))
        return Decorated

    return decorate


def no_checkpoint_before(steps: Sequence[int], distance: int) -> str | None:
    """Return why no checkpoint lies ``distance`` steps before the newest, or None if one does.

    Step 0 counts as a checkpoint: where RL began is always known.
    """
    newest, known = steps[-1], {0, *steps}
    if newest - distance in known:
        return None
    distances = sorted(newest - step for step in known if step < newest)
    return f"no checkpoint {distance} steps before step {newest}; checkpoints lie {distances} steps before it"


def no_checkpoints_apart(steps: Sequence[int], distance: int) -> str | None:
    """Return why no two checkpoints are ``distance`` steps apart, or None if two are."""
    known = set(steps)
    if any(step + distance in known for step in steps):
        return None
    known_distances = sorted(steps[-1] - step for step in known if step < steps[-1])[:MOST_LISTED]
    choice = f"choose a horizon such as {', '.join(map(str, known_distances))}, or " if known_distances else ""
    return f"no two of {len(steps)} checkpoints are {distance} steps apart; {choice}observe more"


def _finite(update: Update) -> bool:
    if isinstance(update, CoefficientUpdate):
        return all(math.isfinite(weight) for weight in update.weights.values())
    return bool(torch.isfinite(update.matrix.left).all() and torch.isfinite(update.matrix.right).all())

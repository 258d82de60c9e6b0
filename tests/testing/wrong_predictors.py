"""For each check of predictors one that is wrong in just what it asks, and right in all else."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, field_validator
from pydantic.json_schema import SkipJsonSchema

from next_core.errors import CheckpointError
from next_core.history.history import History, MatrixHistory
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction, Update
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import Abstain, CoefficientConfig, Outcome, PerMatrixPredictor, TrajectoryPredictor, Work
from next_core.settings import Settings
from next_core.testing.synthetic_runs import FROZEN, SHAPES

WRONG: dict[str, type[TrajectoryPredictor]] = {}


Class = type[TrajectoryPredictor]


def wrong(check: str) -> Callable[[Class], Class]:
    """Take a class as the one that fails this check."""

    def take(cls: Class) -> Class:
        WRONG[check] = cls
        return cls

    return take


class Right(PerMatrixPredictor):
    """The motion of the last interval, continued, times ``factor``."""

    name = "right"
    config_class: type[Settings] = CoefficientConfig

    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return "needs two checkpoints" if len(steps) < 2 else None

    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 1.0

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        before, newest = matrix.steps[-2:]
        c = self.factor(matrix, horizon) * horizon / (newest - before)
        return CoefficientUpdate({newest: c, before: -c}, getattr(self.config, "space", "merged"))

    def with_changes(self, horizon: int, **changes: Any) -> Prediction:
        return dataclasses.replace(Right.predict(self, horizon), **changes)


@wrong("has_a_name")
class HasAName(Right):
    name = "two words"


class Drifting(Settings):
    x: int = 0

    @field_validator("x")
    @classmethod
    def _one_more(cls, value: int) -> int:
        return value + 1


@wrong("settings_survive_a_round_trip")
class SettingsSurviveARoundTrip(Right):
    config_class = Drifting


class Thawed(Settings):
    model_config = ConfigDict(frozen=False)
    x: int = 0


@wrong("settings_are_frozen")
class SettingsAreFrozen(Right):
    config_class = Thawed


class Lenient(Settings):
    model_config = ConfigDict(extra="ignore")


@wrong("settings_refuse_what_they_do_not_know")
class SettingsRefuseWhatTheyDoNotKnow(Right):
    config_class = Lenient


class Hidden(Settings):
    x: Annotated[int, SkipJsonSchema()] = 0


@wrong("settings_have_a_json_schema")
class SettingsHaveAJsonSchema(Right):
    config_class = Hidden


@wrong("is_made_for_a_schedule_that_holds")
class IsMadeForAScheduleThatHolds(Right):
    recommended = {"guards": {"no_such_guard": True}}  # noqa: RUF012


@wrong("requires_what_a_history_has")
class RequiresWhatAHistoryHas(Right):
    requires = frozenset({"everything"})  # type: ignore[arg-type]


@wrong("reads_only_what_it_requires")
class ReadsOnlyWhatItRequires(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 1.0 + 0.0 * float(matrix.gram().sum())


@wrong("works_out_its_work")
class WorksOutItsWork(Right):
    def work(self, *_: Any) -> Work:
        return Work(flops=math.nan)


@wrong("lacks_can_be_asked_before_a_run")
class LacksCanBeAskedBeforeARun(Right):
    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return "no list" if isinstance(steps, list) else super().why_not(steps, horizon)


@wrong("lacks_agrees_with_what_happens")
class LacksAgreesWithWhatHappens(Right):
    def why_not(self, steps: Sequence[int], horizon: int) -> str | None:
        return "needs four checkpoints" if len(steps) < 4 else None

    def _prepare(self, horizon: int) -> Abstain | None:
        return super()._prepare(horizon) if not self.history.names or len(self.history.steps) < 2 else None


@wrong("fit_returns_itself")
class FitReturnsItself(Right):
    def fit(self, history: History) -> Self:
        return copy.copy(super().fit(history))


@wrong("refuses_to_predict_before_fit")
class RefusesToPredictBeforeFit(Right):
    def predict(self, horizon: int) -> Prediction:
        if self._history is None:
            raise AttributeError("_history")
        return super().predict(horizon)


@wrong("refuses_a_horizon_below_one")
class RefusesAHorizonBelowOne(Right):
    def predict(self, horizon: int) -> Prediction:
        return super().predict(max(horizon, 1))


@wrong("predicts_on_its_schedule")
class PredictsOnItsSchedule(Right):
    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return Abstain("today is not the day")


@wrong("takes_a_full_parameter_run")
class TakesAFullParameterRun(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 1.0 if matrix.factored else 0.0


@wrong("says_what_it_counts_from")
class SaysWhatItCountsFrom(Right):
    def predict(self, horizon: int) -> Prediction:
        return self.with_changes(horizon, source=copy.copy(self.history.source))


@wrong("accounts_for_every_matrix")
class AccountsForEveryMatrix(Right):
    def predict(self, horizon: int) -> Prediction:
        return self.with_changes(horizon, abstained={})


@wrong("updates_fit_the_run")
class UpdatesFitTheRun(Right):
    """In factor space a weight that does not sum to zero needs step 0, which a run may not have kept."""

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        return CoefficientUpdate({matrix.steps[-1]: 1.0}, self.config.space)

    def _in_factor_space(self, name: str, update: CoefficientUpdate, confidence: float) -> tuple[Update, float]:
        return update, confidence


@wrong("is_finite")
class IsFinite(Right):
    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        update = super().predict_matrix(matrix, horizon)
        assert isinstance(update, CoefficientUpdate)
        return update, -0.5


@wrong("diagnostics_are_numbers")
class DiagnosticsAreNumbers(Right):
    def predict(self, horizon: int) -> Prediction:
        return self.with_changes(horizon, diagnostics={"mood": "good"})


@wrong("leaves_frozen_matrices_alone")
class LeavesFrozenMatricesAlone(Right):
    def predict(self, horizon: int) -> Prediction:
        found = super().predict(horizon)
        if not found.updates:
            return found
        m, n = SHAPES[FROZEN]
        updates = {**found.updates, FROZEN: LowRankUpdate(LowRank(torch.ones(m, 1), torch.ones(1, n)))}
        return dataclasses.replace(found, updates=updates, abstained={})


@wrong("takes_every_rank")
class TakesEveryRank(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        if matrix.history.rank > 2:
            raise ValueError("too many")
        return 1.0


@wrong("abstains_on_too_few_checkpoints")
class AbstainsOnTooFewCheckpoints(Right):
    def fit(self, history: History) -> Self:
        if len(history.steps) == 1:
            raise ValueError("one is no trajectory")
        return super().fit(history)


@wrong("abstains_where_nothing_moved")
class AbstainsWhereNothingMoved(Right):
    def fit(self, history: History) -> Self:
        if not history.names:
            raise ValueError("nothing moves")
        return super().fit(history)


@wrong("takes_uneven_steps")
class TakesUnevenSteps(Right):
    def fit(self, history: History) -> Self:
        if len({b - a for a, b in zip(history.steps, history.steps[1:], strict=False)}) > 1:
            raise ValueError("out of step")
        return super().fit(history)


@wrong("reports_progress_rightly")
class ReportsProgressRightly(Right):
    def predict(self, horizon: int) -> Prediction:
        if self.progress is not None:
            self.progress("predict", 3, 2)
        return super().predict(horizon)


@wrong("fits_again_to_the_same")
class FitsAgainToTheSame(Right):
    again = False

    def fit(self, history: History) -> Self:
        self.again = self._history is history
        return super().fit(history)

    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 2.0 if self.again else 1.0


@wrong("forgets_the_history_before")
class ForgetsTheHistoryBefore(Right):
    def fit(self, history: History) -> Self:
        return self if self._history is not None else super().fit(history)


@wrong("keeps_horizons_apart")
class KeepsHorizonsApart(Right):
    asked: frozenset[int] = frozenset()

    def predict(self, horizon: int) -> Prediction:
        self.asked |= {horizon}
        return super().predict(horizon)

    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return float(len(self.asked))


@wrong("is_deterministic")
class IsDeterministic(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 1.0 + torch.initial_seed() % 7


@wrong("leaves_the_random_states_alone")
class LeavesTheRandomStatesAlone(Right):
    def fit(self, history: History) -> Self:
        torch.rand(1)
        return super().fit(history)


@wrong("leaves_torchs_settings_alone")
class LeavesTorchsSettingsAlone(Right):
    def fit(self, history: History) -> Self:
        torch.set_grad_enabled(False)
        return super().fit(history)


@wrong("leaves_the_checkpoints_alone")
class LeavesTheCheckpointsAlone(Right):
    def fit(self, history: History) -> Self:
        try:
            start = history.source.factors(FROZEN, 0)
        except CheckpointError:
            start = None
        if start is not None:
            start.A.add_(1.0)
        return super().fit(history)


@wrong("leaves_the_history_alone")
class LeavesTheHistoryAlone(Right):
    requires = frozenset({"gram"})

    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        matrix.gram().add_(1.0)
        return 1.0


@wrong("does_not_depend_on_the_svds_signs")
class DoesNotDependOnTheSvdsSigns(Right):
    requires = frozenset({"global"})

    def predict_matrix(self, matrix: MatrixHistory, horizon: int) -> Outcome:
        found = matrix.components("global", align=False)
        # u and v of one and the same delta have a common sign, those of two do not.
        signs = torch.sign((found.V[0] * found.V[-1]).sum(0) * (found.U[0] * found.U[-1]).sum(0) ** 2)
        return LowRankUpdate(LowRank(found.U[-1] * found.S[-1] * signs, found.V[-1].mT))


def newest_a(matrix: MatrixHistory) -> torch.Tensor:
    at = matrix.history.source.factors(matrix.name, matrix.steps[-1])
    return torch.ones(1, 1) if at is None else at.A


@wrong("does_not_depend_on_the_adapters_signs")
class DoesNotDependOnTheAdaptersSigns(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 2.0 if bool(newest_a(matrix).sum() > 0) else 1.0


@wrong("does_not_depend_on_the_order_of_rank_components")
class DoesNotDependOnTheOrderOfRankComponents(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return float(newest_a(matrix)[0].abs().sum())


@wrong("does_not_depend_on_the_order_of_matrices")
class DoesNotDependOnTheOrderOfMatrices(Right):
    def factor(self, matrix: MatrixHistory, horizon: int) -> float:
        return 1.0 + [parameter.name for parameter in matrix.history.source.parameters].index(matrix.name)


@wrong("pickles")
class Pickles(Right):
    def __reduce__(self) -> Any:
        if self._history is None:
            raise TypeError("not yet")
        return object.__reduce__(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__() if self._history is None else object.__reduce_ex__(self, protocol)


@wrong("pickles_when_fitted")
class PicklesWhenFitted(Right):
    def fit(self, history: History) -> Self:
        self.speed = lambda: 1.0
        return super().fit(history)

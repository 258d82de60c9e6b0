"""Each check of appliers is failed by what is wrong in just this: a live model with one thing done differently."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from next_core.errors import GuardError, PluginError
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.live_weights.in_memory import InMemoryApplied, InMemoryApplier
from next_core.testing import ApplierCase, ContractError, check_applier, checks_of
from tests.testing.test_appliers import live_model
from tests.testing.wrong_predictors import Drifting, Hidden, Lenient, Thawed


class TwoWords(InMemoryApplier):
    name = "two words"


class DriftingSettings(InMemoryApplier):
    config_class = Drifting


class ThawedSettings(InMemoryApplier):
    config_class = Thawed


class LenientSettings(InMemoryApplier):
    config_class = Lenient


class HiddenSettings(InMemoryApplier):
    config_class = Hidden


def parameters(out: Any) -> dict[str, nn.Parameter]:
    return dict(out.named_parameters())


class Wandering(InMemoryApplier):
    """Moves everything by itself too, and knows how to take it back."""

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        applied = super().apply(prediction, alpha, out=out)
        for name, parameter in parameters(out).items():
            applied.write(f"{name} by itself", parameter, torch.ones_like(parameter).double())
        applied.kept.reverse()
        return applied


class AtLeastALittle(InMemoryApplier):
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        return super().apply(prediction, alpha or 0.1, out=out)


class Changed(InMemoryApplier):
    """Applies another prediction than it is given."""

    def change(self, prediction: Prediction) -> Prediction:
        raise NotImplementedError

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        return super().apply(self.change(prediction), alpha, out=out)


def times(factor: float, prediction: Prediction, space: str) -> Prediction:
    updates = {
        name: dataclasses.replace(update, weights={step: factor * weight for step, weight in update.weights.items()})
        if isinstance(update, CoefficientUpdate) and update.space == space and prediction.anchor == "newest"
        else update
        for name, update in prediction.updates.items()
    }
    return dataclasses.replace(prediction, updates=updates)


class TwiceMerged(Changed):
    def change(self, prediction: Prediction) -> Prediction:
        return times(2.0, prediction, "merged")


class TwiceFactors(Changed):
    def change(self, prediction: Prediction) -> Prediction:
        return times(2.0, prediction, "factors")


class BackboneOnTop(Changed):
    """Adds a cumulative prediction on top of the motion that it contains."""

    def change(self, prediction: Prediction) -> Prediction:
        if any(isinstance(update, LowRankUpdate) for update in prediction.updates.values()):
            return prediction
        return dataclasses.replace(prediction, anchor="newest")


class LowRankOnTop(Changed):
    def change(self, prediction: Prediction) -> Prediction:
        if any(isinstance(update, CoefficientUpdate) for update in prediction.updates.values()):
            return prediction
        return dataclasses.replace(prediction, anchor="newest")


class Sure(Changed):
    def change(self, prediction: Prediction) -> Prediction:
        return dataclasses.replace(prediction, confidence={})


class Squared(InMemoryApplier):
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        factors = any(isinstance(u, CoefficientUpdate) and u.space == "factors" for u in prediction.updates.values())
        return super().apply(prediction, alpha if factors else alpha * abs(alpha), out=out)


class Neighbour(InMemoryApplier):
    """Where something moves, one that is not predicted moves a little too."""

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        applied = super().apply(prediction, alpha, out=out)
        if prediction.updates:
            name, parameter = list(parameters(out).items())[-1]
            applied.write(name, parameter, torch.full_like(parameter, 1e-6).double())
        return applied


class Sticky(InMemoryApplied):
    def rollback(self) -> None:
        self.kept = self.kept[:-1]
        super().rollback()


class StickyApplier(InMemoryApplier):
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        applied = super().apply(prediction, alpha, out=out)
        applied.__class__ = Sticky
        return applied


class Eager(InMemoryApplier):
    """Writes as it goes, and leaves what it wrote when an update is refused: for one reason only."""

    refused: tuple[type[Exception], str] = (Exception, "")

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        try:
            return super().apply(prediction, alpha, out=out)
        except self.refused[0] as error:
            if self.refused[1] in str(error):
                first = min(prediction.updates)
                with torch.no_grad():
                    parameters(out)[first].add_(1.0)
            raise


class EagerWithNaN(Eager):
    refused = (GuardError, "is not finite")


class EagerWithShapes(Eager):
    refused = (PluginError, "the parameter (")


class EagerWithSteps(Eager):
    refused = (Exception, "no parameter")


class UnknownLeftOut(Changed):
    """What the run does not have is not an error, and not named."""

    def change(self, prediction: Prediction) -> Prediction:
        known = {parameter.name for parameter in prediction.source.parameters}
        updates = {name: update for name, update in prediction.updates.items() if name in known}
        return dataclasses.replace(prediction, updates=updates)


class Scribbling(InMemoryApplier):
    """Writes into the checkpoints: into one that it has no further use for."""

    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        applied = super().apply(prediction, alpha, out=out)
        if any(isinstance(u, CoefficientUpdate) and u.space == "factors" for u in prediction.updates.values()) and any(
            isinstance(u, LowRankUpdate) for u in prediction.updates.values()
        ):
            source: Any = prediction.source
            source.weights[prediction.step][next(iter(prediction.updates))].add_(1.0)
        return applied


class Drawing(InMemoryApplier):
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        torch.rand(1)
        return super().apply(prediction, alpha, out=out)


class Overdone(InMemoryApplier):
    def apply(self, prediction: Prediction, alpha: float = 1.0, *, out: Any) -> InMemoryApplied:
        self.report_progress("apply", 3, 2)
        return super().apply(prediction, alpha, out=out)


WRONG: dict[str, tuple[type[InMemoryApplier], set[str]]] = {
    "has_a_name": (TwoWords, set()),
    "settings_survive_a_round_trip": (DriftingSettings, set()),
    "settings_are_frozen": (ThawedSettings, set()),
    "settings_refuse_what_they_do_not_know": (LenientSettings, set()),
    "settings_have_a_json_schema": (HiddenSettings, set()),
    "nothing_predicted_is_where_the_run_stands": (Wandering, set()),
    "alpha_zero_is_the_identity": (AtLeastALittle, set()),
    "coefficients_count_from_the_newest_checkpoint": (TwiceMerged, set()),
    "the_backbone_is_counted_once": (BackboneOnTop, set()),
    "low_rank_updates_count_from_their_anchor": (LowRankOnTop, set()),
    "factor_space_moves_the_factors": (TwiceFactors, set()),
    "is_linear_in_alpha": (Squared, set()),
    "confidence_scales_alpha": (Sure, set()),
    "what_is_not_predicted_stays": (Neighbour, {"alpha_zero_is_the_identity"}),
    "rollback_restores_every_bit": (StickyApplier, set()),
    "values_that_are_not_finite_change_nothing": (EagerWithNaN, set()),
    "a_wrong_shape_changes_nothing": (EagerWithShapes, set()),
    "an_unknown_matrix_changes_nothing": (UnknownLeftOut, set()),
    "an_unknown_step_changes_nothing": (EagerWithSteps, {"an_unknown_matrix_changes_nothing"}),
    "leaves_the_checkpoints_alone": (Scribbling, set()),
    "leaves_the_random_states_alone": (Drawing, set()),
    "reports_progress_rightly": (Overdone, set()),
}


def case(cls: type[InMemoryApplier]) -> ApplierCase:
    right = live_model(Path(), None)  # type: ignore[arg-type]
    return dataclasses.replace(right, plugin=cls())


def test_what_is_right_passes() -> None:
    check_applier(case(InMemoryApplier))


@pytest.mark.parametrize("name", checks_of("applier"))
def test_what_is_wrong_in_one_thing_fails_its_check_and_no_other(name: str) -> None:
    cls, besides = WRONG[name]
    with pytest.raises(ContractError) as caught:
        check_applier(case(cls))
    assert name in caught.value.failed
    assert set(caught.value.failed) - {name} <= besides

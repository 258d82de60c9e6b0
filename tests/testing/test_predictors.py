"""Every installed predictor keeps the contract, and each check of predictors fails on a predictor that breaks it."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from next_core import registry
from next_core.history.history import MatrixHistory
from next_core.interfaces import CoefficientUpdate, LowRankUpdate
from next_core.mathematics.low_rank import LowRank
from next_core.predictor import Abstain, CoefficientConfig, Outcome, PerMatrixPredictor, TrajectoryPredictor, Work
from next_core.settings import Settings
from next_core.testing import Check, check_predictor, checks_of, parametrize_with_checks
from next_core.testing.synthetic_runs import FROZEN, SHAPES
from tests.testing.helpers import COMMON, fails

QUICK = {"epochs": 4, "hidden": 8, "lr": 1e-2}
"""Settings of networks that train in milliseconds and still predict something."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "alpharl": [{"metric": "reward", "anchor": "newest"}],
    "auto": [{"per_matrix": True}],
    "random": [{"rank": 3}],
    "relex": [{"anchor": "newest", "rank": 2}],
    "secant": [{"anchor": "backbone"}, {"gate": {"window": 10}}],
    "stay": [{"jump": True}],
}
"""Settings that make a predictor take other paths than its defaults do."""


def predictors() -> list[TrajectoryPredictor]:
    ours = [e.name for e in registry().entries() if e.kind == "predictor" and e.distribution == "next-core"]
    assert set(VARIANTS) <= set(ours)
    found = []
    for name in ours:
        cls = registry().get("predictor", name)
        if not issubclass(cls, TrajectoryPredictor):
            continue
        quick = {key: value for key, value in QUICK.items() if set(QUICK) <= set(cls.config_class.model_fields)}
        found += [cls(cls.config_class(**(quick | more))) for more in ({}, *VARIANTS.get(name, []))]
    return found


@parametrize_with_checks(predictors())
def test_predictors_keep_the_contract(
    plugin: TrajectoryPredictor, check: Check, request: pytest.FixtureRequest
) -> None:
    if (plugin.name, check.__name__) == ("stay", "predicts_on_its_schedule"):
        request.applymarker(pytest.mark.xfail(reason="it is the control: by design it moves nothing", strict=True))
    check(plugin)


class Right(PerMatrixPredictor):
    """Repeats the motion of the last interval, times ``factor``."""

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


def fit_that(act: Any) -> Any:
    """A ``fit`` that does something first."""

    def fit(self: Right, history: Any) -> Any:
        act(self, history)
        return PerMatrixPredictor.fit(self, history)

    return fit


def with_changes(change: Any) -> Any:
    """A ``predict`` that changes fields of the right prediction."""
    return lambda self, horizon: dataclasses.replace(
        found := PerMatrixPredictor.predict(self, horizon), **change(found)
    )


def raise_if(wrong: bool) -> None:
    if wrong:
        raise ValueError("not this run")


def newest_a(matrix: MatrixHistory) -> torch.Tensor:
    at = matrix.history.source.factors(matrix.name, matrix.steps[-1])
    return torch.ones(1, 1) if at is None else at.A


def unaligned_svd(self: Right, matrix: MatrixHistory, horizon: int) -> Outcome:
    found = matrix.components("global", align=False)
    # u and v of one delta have a common sign; those of two deltas do not.
    signs = torch.sign((found.V[0] * found.V[-1]).sum(0) * (found.U[0] * found.U[-1]).sum(0) ** 2)
    return LowRankUpdate(LowRank(found.U[-1] * found.S[-1] * signs, found.V[-1].mT))


def move_the_frozen_matrix(found: Any) -> Mapping[str, Any]:
    m, n = SHAPES[FROZEN]
    ones = LowRankUpdate(LowRank(torch.ones(m, 1), torch.ones(1, n)))
    return {"updates": {**found.updates, FROZEN: ones}, "abstained": {}} if found.updates else {}


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("recommends_a_schedule_it_can_act_on", {"recommended": {"guards": {"no_such_guard": True}}}),
    ("recommends_a_schedule_it_can_act_on", {"why_not": lambda self, steps, horizon: "never acts"}),
    ("declares_what_it_reads_and_costs", {"factor": lambda self, matrix, _: float(matrix.gram().sum())}),
    ("declares_what_it_reads_and_costs", {"work": lambda self, *_: Work(flops=float("nan"))}),
    ("predicts_on_its_schedule", {"predict_matrix": lambda self, matrix, _: Abstain("not today")}),
    ("predicts_or_says_why_not", {"why_not": lambda self, steps, _: None if isinstance(steps, list) else "list?"}),
    (
        "predicts_or_says_why_not",  # why_not is stricter than predict
        {
            "why_not": lambda self, steps, _: "needs four checkpoints" if len(steps) < 4 else None,
            "_prepare": lambda self, _: Abstain("one") if len(self.history.steps) < 2 else None,
        },
    ),
    ("predicts_or_says_why_not", {"predict": with_changes(lambda found: {"source": copy.copy(found.source)})}),
    ("predicts_or_says_why_not", {"predict": with_changes(lambda found: {"diagnostics": {"mood": "good"}})}),
    ("predicts_or_says_why_not", {"predict": with_changes(lambda found: {"abstained": {}})}),
    ("predicts_or_says_why_not", {"fit": fit_that(lambda _, h: raise_if(len(set(np.diff(h.steps))) > 1))}),
    (
        "updates_fit_the_run",
        {"predict": with_changes(lambda found: {"confidence": dict.fromkeys(found.updates, -0.5)})},
    ),
    ("updates_fit_the_run", {"predict_matrix": lambda *_: CoefficientUpdate({1_000: 1.0, 5: -1.0})}),
    ("updates_fit_the_run", {"fit": fit_that(lambda _, history: raise_if(history.rank > 2))}),
    (
        "updates_fit_the_run",  # in factor space, weights that do not sum to zero need step 0
        {
            "predict_matrix": lambda self, matrix, _: CoefficientUpdate({matrix.steps[-1]: 1.0}, self.config.space),
            "_in_factor_space": lambda self, name, update, confidence: (update, confidence),
        },
    ),
    (
        "reads_no_further_back_than_it_says",
        {"reads_back": lambda *_: 10, "factor": lambda self, matrix, _: 1.0 + float(matrix.gram().sum())},
    ),
    ("leaves_frozen_matrices_alone", {"predict": with_changes(move_the_frozen_matrix)}),
    ("leaves_frozen_matrices_alone", {"fit": fit_that(lambda _, history: raise_if(not history.names))}),
    ("is_deterministic", {"factor": lambda *_: 1.0 + (torch.initial_seed() == 1)}),
    ("is_deterministic", {"fit": lambda self, h: self if self._history else PerMatrixPredictor.fit(self, h)}),
    ("is_deterministic", {"factor": lambda self, *_: setattr(self, "n", getattr(self, "n", 0.0) + 1) or self.n}),
    ("changes_nothing_else", {"fit": fit_that(lambda *_: torch.rand(1))}),
    ("changes_nothing_else", {"factor": lambda self, matrix, _: 1.0 + 0.0 * float(matrix.gram().add_(1.0).sum())}),
    ("changes_nothing_else", {"fit": fit_that(lambda _, h: next(iter(h.source.tensors().values())).add_(1.0))}),
    ("does_not_depend_on_signs_and_order", {"predict_matrix": unaligned_svd}),
    ("does_not_depend_on_signs_and_order", {"factor": lambda self, m, _: 1.0 + float(newest_a(m).sum() > 0)}),
    ("does_not_depend_on_signs_and_order", {"factor": lambda self, m, _: float(newest_a(m)[0].abs().sum())}),
    (
        "does_not_depend_on_signs_and_order",
        {"factor": lambda self, m, _: 1.0 + [p.name for p in m.history.source.parameters].index(m.name)},
    ),
    ("pickles", {}),  # a class made on the spot, which another process cannot import
]


def test_what_is_right_passes() -> None:
    check_predictor(Right)
    check_predictor(Right())


@pytest.mark.parametrize(("check", "overrides"), WRONG, ids=[check for check, _ in WRONG])
def test_a_check_fails_on_a_predictor_that_breaks_it(check: str, overrides: Mapping[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the check seeds with 1: what depends on the seed must not have had that one already
        assert fails(check, "predictor", type("Wrong", (Right,), {"name": "wrong", **overrides}))


def test_every_check_has_a_predictor_that_breaks_it() -> None:
    assert {name for name, _ in WRONG} | {COMMON} == set(checks_of("predictor"))

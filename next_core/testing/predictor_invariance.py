"""Checks of predictors: what must not change a prediction, and what making one must not change."""

from __future__ import annotations

import functools
import pickle
import random
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from next_core.history.history import DeltaKind, History
from next_core.testing.check_runner import expect, register
from next_core.testing.predictor_case import (
    NAMES,
    PredictorCase,
    TurnedSigns,
    checked,
    expect_same,
    history,
    predict,
    unchanged,
)
from next_core.testing.synthetic_runs import RANK, Weight
from next_core.types import LoraFactors

check = register("predictor", PredictorCase)


@check
def fits_again_to_the_same(case: PredictorCase) -> None:
    """Fitting and predicting twice on one history gives the same prediction, bit for bit."""
    for label, run in case.runs():
        predictor, one = case.make(), history(run)
        first = checked(predictor.fit(one).predict(case.horizon))
        second = checked(predictor.predict(case.horizon))
        expect_same(first, second, f"when {label} is predicted twice", exactly=True)
        third = checked(predictor.fit(one).predict(case.horizon))
        expect_same(first, third, f"when the same history of {label} is fitted again", exactly=True)


@check
def forgets_the_history_before(case: PredictorCase) -> None:
    """A second `fit` takes the new history alone."""
    for label, run in case.runs():
        other = case.lora(seed=1) if run.factors(NAMES[0], run.steps[-1]) is not None else case.dense(seed=1)
        used = case.make()
        predict(used, other, case.horizon)
        fresh, again = predict(case.make(), run, case.horizon), predict(used, run, case.horizon)
        expect_same(fresh, again, f"of {label} whether or not another run was fitted before", exactly=True)


@check
def keeps_horizons_apart(case: PredictorCase) -> None:
    """Asking for another horizon in between changes nothing."""
    fitted = case.make().fit(history(case.lora()))
    first = checked(fitted.predict(case.horizon))
    other = checked(fitted.predict(2 * case.horizon))
    expect(other.horizon == 2 * case.horizon, f"a prediction of horizon {2 * case.horizon}", other.horizon)
    expect_same(first, checked(fitted.predict(case.horizon)), "after another horizon was asked for", exactly=True)


@check
def is_deterministic(case: PredictorCase) -> None:
    """Two predictors of the same settings agree bit for bit, whatever the global random state is."""
    for label, run in case.runs():
        with torch.random.fork_rng(devices=[]):
            before = random.getstate(), np.random.get_state()
            try:
                found = []
                for seed in (1, 2):
                    torch.manual_seed(seed)
                    np.random.seed(seed)
                    random.seed(seed)
                    found.append(predict(case.make(), run, case.horizon))
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])
        expect_same(found[0], found[1], f"of {label} with another global random state", exactly=True)


@check
def leaves_the_random_states_alone(case: PredictorCase) -> None:
    """Neither torch's, numpy's nor Python's global random state is drawn from or seeded: they are the trainer's."""
    for _, run in case.runs():
        with (
            unchanged("torch's global random state", torch.random.get_rng_state, torch.equal),
            unchanged("numpy's global random state", lambda: pickle.dumps(np.random.get_state()), bytes.__eq__),
            unchanged("Python's global random state", random.getstate, tuple.__eq__),
        ):
            predict(case.make(), run, case.horizon)


@check
def leaves_torchs_settings_alone(case: PredictorCase) -> None:
    """The default precision, gradients on or off, and the number of threads stay as they are."""

    def settings() -> tuple[object, ...]:
        return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()

    threads = torch.get_num_threads()
    what = "torch's default dtype, gradient mode and number of threads"
    try:
        for _, run in case.runs():
            with torch.enable_grad(), unchanged(what, settings, tuple.__eq__):  # on, whatever it left behind before
                predict(case.make(), run, case.horizon)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@check
def leaves_the_checkpoints_alone(case: PredictorCase) -> None:
    """The tensors of the source are not written to, bit for bit."""
    for label, run in case.runs():
        kept = {name: value.clone() for name, value in run.tensors().items()}
        predict(case.make(), run, case.horizon)
        for name, value in run.tensors().items():
            expect(torch.equal(value, kept[name]), f"the checkpoints of {label} as before", f"{name} was changed")


@check
def leaves_the_history_alone(case: PredictorCase) -> None:
    """What a history gives is shared by all who read it: inner products and components are not written to."""
    for label, run in case.runs():
        one = history(run, 2)
        kept = {what: value.clone() for what, value in _contents(one, case.horizon).items()}
        case.make().fit(one).predict(case.horizon)
        for what, value in _contents(one, case.horizon).items():
            same = torch.equal(value, kept[what])
            expect(same, f"the history of {label} gives what it gave before", f"{what} was changed")


def _contents(one: History, horizon: int) -> dict[str, Tensor]:
    found = {f"the inner products of {name}": gram for name, gram in one.grams().items()}
    for kind in get_args(DeltaKind):
        for name, factors in one.components(kind, horizon if kind == "target" else None).items():
            found |= {f"{part} of {name}'s {kind} components": getattr(factors, part) for part in ("U", "S", "V")}
    return found


@check
def does_not_depend_on_the_svds_signs(case: PredictorCase) -> None:
    """Signs of u and v turned together, as an SVD is free to do, change nothing."""
    for label, run in case.runs():
        plain = predict(case.make(), run, case.horizon, 2)
        for seed in (1, 2):
            turned = predict(case.make(), run, case.horizon, 2, TurnedSigns(seed))
            expect_same(plain, turned, f"of {label} with singular vectors of other signs")


@check
def does_not_depend_on_the_adapters_signs(case: PredictorCase) -> None:
    """A and B both negated are the same adapter."""
    run = case.lora()
    for variant, predictor in case.variants():
        plain = predict(predictor, run, case.horizon)
        turned = predict(predictor, run.mapped(_negated), case.horizon)
        expect_same(plain, turned, f"with A and B both negated{variant}")


@check
def does_not_depend_on_the_order_of_rank_components(case: PredictorCase) -> None:
    """The rows of A, and the columns of B with them, in another order are the same adapter."""
    run = case.lora()
    for variant, predictor in case.variants():
        plain = predict(predictor, run, case.horizon)
        other = predict(predictor, run.mapped(functools.partial(_reordered, order=_ORDER)), case.horizon)
        expect_same(plain, other, f"with the adapter's rank components in another order{variant}")


@check
def does_not_depend_on_the_order_of_matrices(case: PredictorCase) -> None:
    """The same matrices in another order get the same predictions."""
    for label, run in case.runs():
        plain = predict(case.make(), run, case.horizon)
        other = predict(case.make(), run.mapped(lambda value: value, NAMES[::-1]), case.horizon)
        expect_same(plain, other, f"of {label} with its matrices in another order")


@check
def pickles(case: PredictorCase) -> None:
    """Class, settings and a predictor that was not fitted yet go to another process and predict the same there."""
    again = pickle.loads(pickle.dumps(case.cls))
    expect(again is case.cls, "a pickled class is found again by its module and name", repr(again))
    sent = pickle.loads(pickle.dumps(case.make()))
    plain, other = (predict(one, case.lora(), case.horizon) for one in (case.make(), sent))
    expect_same(plain, other, "after a round trip through pickle", exactly=True)


@check
def pickles_when_fitted(case: PredictorCase) -> None:
    """A fitted predictor goes to another process with its history, and predicts the same there."""
    fitted = case.make().fit(history(case.lora()))
    plain = checked(fitted.predict(case.horizon))
    sent = pickle.loads(pickle.dumps(fitted))
    expect_same(plain, checked(sent.predict(case.horizon)), "after a round trip through pickle", exactly=True)


_ORDER = tuple((index + 1) % RANK for index in range(RANK))


def _negated(value: Weight) -> Weight:
    assert isinstance(value, LoraFactors)
    return LoraFactors(-value.A, -value.B, value.scaling)


def _reordered(value: Weight, order: tuple[int, ...]) -> Weight:
    assert isinstance(value, LoraFactors)
    where = list(order)
    return LoraFactors(value.A[where], value.B[:, where], value.scaling)

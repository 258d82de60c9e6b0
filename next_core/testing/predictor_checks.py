"""Checks of predictors: what ``TrajectoryPredictor`` and ``Prediction`` say in words, asked of tiny runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, get_args

import torch

from next_core.errors import ConfigError, NextCoreError
from next_core.history.history import History
from next_core.interfaces import CoefficientUpdate, LowRankUpdate, Prediction
from next_core.interfaces.prediction import weight_delta
from next_core.predictor import Needs, TrajectoryPredictor, Work
from next_core.run_config import Guards
from next_core.testing.check_runner import expect, raises, register, run_checks
from next_core.testing.plugin_checks import register_common
from next_core.testing.predictor_case import PredictorCase, checked, history, moved, predict
from next_core.testing.synthetic_runs import FROZEN, SHAPES, SyntheticRun
from next_core.types import Anchor, Span

KIND: Final = "predictor"
register_common(KIND, PredictorCase)
check = register(KIND, PredictorCase)


def check_predictor(
    predictor: type[TrajectoryPredictor] | TrajectoryPredictor,
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Run every check of a predictor: a class, made with its default settings, or an instance, made anew as it is.

    ``expected_failures`` maps the name of a check to the reason why it fails; one that passes all the same is a
    failure. Raises ``ContractError`` with all that failed, and ``ConfigError`` for an expected failure without a reason
    or of no check.
    """
    case = PredictorCase(predictor)
    run_checks(KIND, predictor, case, expected_failures, f"predictor '{case.cls.name}'")


@check
def is_made_for_a_schedule_that_holds(case: PredictorCase) -> None:
    """`recommended` are valid fields of `schedule` and `guards`, and on that schedule the predictor can act."""
    known = {"schedule", "guards"}
    expect(
        set(case.cls.recommended) <= known,
        f"recommended has {sorted(known)} and nothing else",
        sorted(case.cls.recommended),
    )
    guards = Guards.model_validate(dict(case.cls.recommended.get("guards", {})))
    schedule = case.schedule
    guards.check(schedule)
    schedule.check_predictor(case.make(), schedule.observe + schedule.settle + schedule.every)


@check
def requires_what_a_history_has(case: PredictorCase) -> None:
    """`requires` is a frozenset of the kinds of things that a history gives."""
    known = set(get_args(Needs))
    needs = case.cls.requires
    expect(isinstance(needs, frozenset) and needs <= known, f"a frozenset out of {sorted(known)}", repr(needs))


@check
def reads_only_what_it_requires(case: PredictorCase) -> None:
    """What it reads of a history is declared in `requires`: `next-core plan` and `compare` go by it."""
    for label, run in case.runs():
        read = _Reading(run)
        case.make().fit(read).predict(case.horizon)
        missing = sorted(read.was_asked_for - case.cls.requires)
        expect(not missing, f"requires names all that is read of {label}", f"{missing} read, not required")


class _Reading(History):
    """A history that writes down what it is asked for."""

    def __init__(self, source: SyntheticRun) -> None:
        self.was_asked_for: set[str] = set()
        super().__init__(source)

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, torch.Tensor]:
        self.was_asked_for.add("gram")
        return super().inner_products(spans)

    def compress(self, *kinds, horizon=None):  # type: ignore[no-untyped-def]
        self.was_asked_for |= set(kinds)
        super().compress(*kinds, horizon=horizon)

    def metrics(self, key: str) -> list[float | None]:
        self.was_asked_for.add("metrics")
        return super().metrics(key)


@check
def works_out_its_work(case: PredictorCase) -> None:
    """`work` gives finite numbers that are not negative, before anything was fitted."""
    found = case.make().work(SHAPES, case.steps, case.horizon, 2)
    expect(isinstance(found, Work), "work answers with a Work", type(found).__name__)
    figures = (found.flops, found.bytes, found.single_flops)
    expect(all(math.isfinite(x) and x >= 0 for x in figures), "finite figures, none below 0", repr(found))


@check
def lacks_can_be_asked_before_a_run(case: PredictorCase) -> None:
    """`lacks` needs no history, takes any sequence of steps, and answers None or a reason in words."""
    for count in range(1, len(case.steps) + 1):
        steps = case.steps[:count]
        said = case.make().why_not(steps, case.horizon)
        words = said is None or (isinstance(said, str) and bool(said.strip()))
        expect(words, f"None, or a reason, for steps {list(steps)}", repr(said))
        for same in (list(steps), range(steps[0], steps[-1] + 1, case.schedule.every)):
            again = case.make().why_not(same, case.horizon)
            expect(again == said, f"for {same!r} the same answer as for a tuple: {said!r}", repr(again))


@check
def lacks_agrees_with_what_happens(case: PredictorCase) -> None:
    """Where `lacks` gives a reason, the predictor abstains, on whatever checkpoints."""
    for label, run in case.runs():
        for steps in _fewer(case.steps):
            reason = case.make().why_not(steps, case.horizon)
            if reason is not None:
                found = predict(case.make(), run.only([s for s in run.weights if s == 0 or s in steps]), case.horizon)
                wanted = f"an abstention on {label} with steps {list(steps)}, of which lacks says: {reason}"
                expect(found.abstention is not None and not found.updates, wanted, _outcome(found))


@check
def fit_returns_itself(case: PredictorCase) -> None:
    """`fit` returns the predictor, so that `make_predictor(...).fit(history).predict(horizon)` reads well."""
    predictor = case.make()
    answer: object = predictor.fit(history(case.lora()))
    expect(answer is predictor, "fit returns self", repr(answer))


@check
def refuses_to_predict_before_fit(case: PredictorCase) -> None:
    """`predict` before `fit` is one of next-core's own errors."""
    raises(NextCoreError, lambda: case.make().predict(case.horizon), "predict before fit")


@check
def refuses_a_horizon_below_one(case: PredictorCase) -> None:
    """A horizon of 0 or less is a mistake of the caller: `ConfigError`, and not an abstention."""
    fitted = case.make().fit(history(case.lora()))
    for horizon in (0, -1, -case.horizon):
        raises(ConfigError, lambda horizon=horizon: fitted.predict(horizon), f"predict({horizon})")  # type: ignore[misc]


@check
def predicts_on_its_schedule(case: PredictorCase) -> None:
    """On a LoRA run that drifts and bends, on the schedule it is made for, some matrix moves."""
    found = predict(case.make(), case.lora(), case.horizon)
    expect(bool(moved(found)), f"a jump from steps {list(case.steps)}, horizon {case.horizon}", _outcome(found))


@check
def takes_a_full_parameter_run(case: PredictorCase) -> None:
    """A run without LoRA gets a prediction as well, or an abstention that says why not."""
    found = predict(case.make(), case.dense(), case.horizon)
    expect(bool(moved(found)) or bool(found.abstention), "a jump, or a reason in `abstention`", _outcome(found))


@check
def says_what_it_counts_from(case: PredictorCase) -> None:
    """A prediction names its source, the newest step, the horizon asked for, and a known anchor."""
    for _, run in case.runs():
        found = predict(case.make(), run, case.horizon)
        expect(found.source is run, "`source` is the one of the history", repr(found.source))
        expect(found.step == run.steps[-1], f"`step` is the newest, {run.steps[-1]}", found.step)
        expect(found.horizon == case.horizon, f"`horizon` is the one asked for, {case.horizon}", found.horizon)
        expect(found.anchor in get_args(Anchor), f"`anchor` is one of {get_args(Anchor)}", repr(found.anchor))


@check
def accounts_for_every_matrix(case: PredictorCase) -> None:
    """Each matrix has an update, or a reason in `abstained`; without any update there is a reason in `abstention`."""
    for label, run in case.runs():
        for steps in (case.steps, *_fewer(case.steps)):
            found = predict(case.make(), run.only([s for s in run.weights if s == 0 or s in steps]), case.horizon)
            for name, reason in found.abstained.items():
                expect(name in SHAPES and name not in found.updates, "abstained names matrices without update", name)
                expect(isinstance(reason, str) and bool(reason.strip()), f"a reason why '{name}' stays", repr(reason))
            if found.abstention is not None:
                words = isinstance(found.abstention, str) and bool(found.abstention.strip())
                expect(words, "`abstention` is a reason in words", repr(found.abstention))
                expect(not found.updates, "an abstention comes without updates", sorted(found.updates))
            else:
                expect(bool(found.updates), f"updates or an abstention on {label}, steps {list(steps)}", "neither")
                silent = sorted(set(SHAPES) - set(found.updates) - set(found.abstained))
                expect(not silent, f"an update or a reason for each matrix of {label}", f"neither for {silent}")


@check
def updates_fit_the_run(case: PredictorCase) -> None:
    """Updates name matrices of the run, have their shapes, and weigh steps that were observed; in either space."""
    runs = [*case.runs(), ("a LoRA run that kept no step 0", case.lora(start=False))]
    for label, run in runs:
        for variant, predictor in case.variants():
            where = f"on {label}{variant}"
            found = predict(predictor, run, case.horizon)
            unknown = sorted(set(found.updates) - set(SHAPES))
            expect(not unknown, f"updates of the run's matrices {where}", f"updates of {unknown}")
            for name, update in found.updates.items():
                expect(isinstance(update, CoefficientUpdate | LowRankUpdate), f"an update of '{name}'", repr(update))
                if isinstance(update, CoefficientUpdate):
                    strange = sorted(set(update.weights) - {0, *run.steps})
                    expect(not strange, f"weights of observed steps, or step 0, {where}", f"weights of {strange}")
                else:
                    shape = tuple(update.matrix.shape)
                    expect(shape == SHAPES[name], f"'{name}' moves by {SHAPES[name]} {where}", shape)
                weight_delta(found, name, 1.0)  # an applier can resolve it


@check
def is_finite(case: PredictorCase) -> None:
    """Displacements and confidences are finite; a confidence belongs to an update and is not negative."""
    for label, run in case.runs():
        found = predict(case.make(), run, case.horizon)
        for name, weight in found.confidence.items():
            expect(name in found.updates, "confidence only where there is an update", f"confidence of '{name}'")
            good = _is_number(weight) and weight >= 0
            expect(good, f"a finite confidence of '{name}' on {label}, 0 or more", repr(weight))
        for name, update in found.updates.items():
            finite = (
                all(_is_number(weight) for weight in update.weights.values())
                if isinstance(update, CoefficientUpdate)
                else bool(torch.isfinite(update.matrix.dense()).all())
            )
            expect(finite, f"a finite update of '{name}' on {label}", "NaN or infinity")


@check
def diagnostics_are_numbers(case: PredictorCase) -> None:
    """`diagnostics` are finite numbers by name: they go into the journal."""
    for label, run in case.runs():
        for name, value in predict(case.make(), run, case.horizon).diagnostics.items():
            expect(isinstance(name, str), f"names that are text on {label}", repr(name))
            expect(_is_number(value), f"a finite number as diagnostic '{name}' on {label}", repr(value))


@check
def leaves_frozen_matrices_alone(case: PredictorCase) -> None:
    """A matrix that did not move gets no update, or one of zero."""
    for label, run in case.runs():
        by = moved(predict(case.make(), run, case.horizon)).get(FROZEN)
        expect(by is None, f"'{FROZEN}', which stood still in {label}, stays", "it is moved")


@check
def takes_every_rank(case: PredictorCase) -> None:
    """Histories of rank 1, 2, 3, and more than a matrix has, are read alike."""
    for _, run in case.runs():
        for rank in (1, 2, 3, 9):
            moved(predict(case.make(), run, case.horizon, rank))


@check
def abstains_on_too_few_checkpoints(case: PredictorCase) -> None:
    """One, two or three checkpoints give a prediction or an abstention with its reason, and no exception."""
    for label, run in case.runs():
        for count in (1, 2, 3):
            kept = [s for s in run.weights if s == 0 or s in case.steps[:count]]
            found = predict(case.make(), run.only(kept), case.horizon)
            good = bool(found.updates) or bool(found.abstention)
            expect(good, f"a prediction, or a reason not to, after {count} checkpoints of {label}", _outcome(found))


@check
def abstains_where_nothing_moved(case: PredictorCase) -> None:
    """A run none of whose matrices moves is an abstention with its reason, and no exception."""
    for label, run in (("a LoRA run", case.lora(moves=False)), ("a full-parameter run", case.dense(moves=False))):
        found = predict(case.make(), run, case.horizon)
        expect(bool(found.abstention) and not moved(found), f"an abstention on {label} at rest", _outcome(found))


@check
def takes_uneven_steps(case: PredictorCase) -> None:
    """Checkpoints that are not evenly spaced give a prediction or an abstention, and no exception."""
    for label, run in case.runs():
        steps = [s for i, s in enumerate(case.steps) if i % 3 != 1]
        found = predict(case.make(), run.only([s for s in run.weights if s == 0 or s in steps]), case.horizon)
        expect(bool(found.updates) or bool(found.abstention), f"either on {label} with steps {steps}", _outcome(found))
        moved(found)


@check
def reports_progress_rightly(case: PredictorCase) -> None:
    """`progress(what, done, total)`, where it is called: words, and 0 <= done <= total."""
    told: list[tuple[object, ...]] = []
    predictor = case.make()
    predictor.progress = lambda *facts: told.append(facts)
    predict(predictor, case.lora(), case.horizon)
    for facts in told:
        good = len(facts) == 3 and isinstance(facts[0], str) and 0 <= facts[1] <= facts[2]  # type: ignore[operator]
        expect(good, "progress(what, done, total) with 0 <= done <= total", facts)


def _fewer(steps: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield from (steps[:count] for count in (1, 2, 3, len(steps) // 2))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outcome(found: Prediction) -> str:
    checked(found)
    if found.abstention is not None:
        return f"abstention: {found.abstention!r}"
    return f"updates of {sorted(found.updates)}, abstained: {dict(found.abstained)}"

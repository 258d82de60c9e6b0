"""Checks of predictors: the promises of ``TrajectoryPredictor`` and ``Prediction``, tested on tiny runs."""

from __future__ import annotations

import functools
import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.errors import ConfigError, NextCoreError
from next_core.history.history import DeltaKind, History
from next_core.interfaces import Compressor, LowRankUpdate, Prediction
from next_core.mathematics.lora_trajectory import LoraTrajectory
from next_core.mathematics.low_rank import Factors, LowRank, dense
from next_core.predictor import TrajectoryPredictor, Work
from next_core.run_config import Guards, Schedule
from next_core.testing.check_runner import (
    CheckError,
    expect,
    expect_progress,
    expect_raises,
    expect_text,
    global_state_unchanged,
)
from next_core.testing.plugin_checks import check_set
from next_core.testing.synthetic_runs import FROZEN, SHAPES, SyntheticRun, Weight, dense_run, lora_run
from next_core.types import Anchor, LoraFactors, Span

TOLERANCE = 1e-3
"""Relative error allowed between two forms of one run: networks train in fp32, so rounding differs."""


class PredictorCase:
    """A predictor's class and settings, and runs on the schedule it recommends."""

    def __init__(self, predictor: type[TrajectoryPredictor] | TrajectoryPredictor) -> None:
        self.plugin = predictor() if isinstance(predictor, type) else predictor
        self.cls: type[TrajectoryPredictor] = type(self.plugin)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The recommended schedule; missing fields have the engine's defaults."""
        return Schedule.model_validate(dict(self.cls.recommended.get("schedule", {})))

    @property
    def horizon(self) -> int:
        return self.schedule.horizon

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints before the first jump of the schedule."""
        return tuple(range(self.schedule.every, self.schedule.observe + 1, self.schedule.every))

    def make(self, **changes: Any) -> TrajectoryPredictor:
        """Return a new predictor of the same settings, with some changed."""
        config = self.plugin.config
        return self.cls(type(config).model_validate(config.model_dump() | changes) if changes else config)

    def variants(self) -> Iterator[tuple[str, TrajectoryPredictor]]:
        """Yield a new predictor and its description; one per space where there is a setting ``space``."""
        if "space" not in type(self.plugin.config).model_fields:
            yield "", self.make()
            return
        for space in ("factors", "merged"):
            yield f" with space: {space}", self.make(space=space)

    def runs(self, **changes: Any) -> Iterator[tuple[str, SyntheticRun]]:
        """Yield a run of each kind and its description."""
        yield "a LoRA run", lora_run(self.steps, **changes)
        yield "a full-parameter run", dense_run(self.steps, **changes)

    def predict(
        self,
        run: SyntheticRun,
        predictor: TrajectoryPredictor | None = None,
        rank: int = 1,
        compressor: Compressor | None = None,
    ) -> Prediction:
        """Fit a predictor (by default a new one) on a run, and predict."""
        return predict((predictor or self.make()).fit(history(run, rank, compressor)), self.horizon)

    def shortened(self, run: SyntheticRun) -> Iterator[tuple[tuple[int, ...], SyntheticRun]]:
        """Yield the run with few or unevenly spaced checkpoints, and their steps."""
        steps = self.steps
        few = (steps[:count] for count in (1, 2, 3, len(steps) // 2))
        for kept in (*few, tuple(step for index, step in enumerate(steps) if index % 3 != 1)):
            yield kept, run.only([step for step in run.weights if step == 0 or step in kept])


CHECKS = check_set("predictor", TrajectoryPredictor, PredictorCase)
check = CHECKS.add


def check_predictor(
    predictor: type[TrajectoryPredictor] | TrajectoryPredictor,
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Run every check of a predictor: a class, built with default settings, or an instance, rebuilt with its own.

    ``expected_failures`` maps a check to the reason why it fails; one that passes anyway counts as a failure. Raises
    ``ContractError`` listing all failures, and ``ConfigError`` for an expected failure that names no check or has no
    reason.
    """
    case = PredictorCase(predictor)
    CHECKS.run(f"predictor '{case.cls.name}'", case, expected_failures)


@check
def recommends_a_schedule_it_can_act_on(case: PredictorCase) -> None:
    """`recommended` has valid fields of `schedule` and `guards`, and on that schedule the predictor can act."""
    known, found = {"schedule", "guards"}, set(case.cls.recommended)
    expect(found <= known, f"recommended has only {sorted(known)}", sorted(found))
    Guards.model_validate(dict(case.cls.recommended.get("guards", {}))).check(case.schedule)
    total = case.schedule.observe + case.schedule.settle + case.schedule.every
    case.schedule.check_predictor(case.make(), total)


@check
def declares_what_it_reads_and_costs(case: PredictorCase) -> None:
    """`requires` names all it reads of a history, and `work` is finite: `next-core plan` and `compare` rely on them."""
    required, work = case.cls.requires, case.make().work(SHAPES, case.steps, case.horizon, 2)
    expect(isinstance(required, frozenset), "`requires` is a frozenset", repr(required))
    for label, run in case.runs():
        recording = _RecordingHistory(run)
        case.make().fit(recording).predict(case.horizon)
        missing = sorted(recording.read - required)
        expect(not missing, f"`requires` names everything read of {label}", f"{missing} is read but not required")
    good = isinstance(work, Work) and all(0 <= x < math.inf for x in (work.flops, work.bytes, work.single_flops))
    expect(good, "a Work with finite numbers, 0 or more", repr(work))


@check
def why_not_agrees_with_predict(case: PredictorCase) -> None:
    """`why_not` takes any sequence of steps before a run, and where it gives a reason the predictor abstains."""
    for label, run in case.runs():
        for steps, shorter in case.shortened(run):
            reason, again = (case.make().why_not(given, case.horizon) for given in (steps, list(steps)))
            expect(again == reason, f"the same answer for the list {list(steps)} as for a tuple: {reason!r}", again)
            if reason is not None:
                expect_text(reason, f"why_not for steps {list(steps)}: None or a reason")
                found = case.predict(shorter)
                wanted = f"an abstention on {label} with steps {list(steps)}, as why_not says: {reason}"
                expect(found.abstention is not None and not found.updates, wanted, _outcome(found))


@check
def refuses_wrong_calls(case: PredictorCase) -> None:
    """`predict` before `fit` is an error of next-core, and a horizon below 1 a `ConfigError`, not an abstention."""
    expect_raises(NextCoreError, lambda: case.make().predict(case.horizon), "predict before fit")
    fitted = case.make().fit(history(lora_run(case.steps)))
    for horizon in (0, -case.horizon):
        expect_raises(ConfigError, functools.partial(fitted.predict, horizon), f"predict({horizon})")


@check
def predicts_on_its_schedule(case: PredictorCase) -> None:
    """On a LoRA run that drifts and bends, some matrix moves; `fit` returns self, and `progress` gets valid calls."""
    predictor, calls = case.make(), list[tuple[Any, ...]]()
    predictor.progress = lambda *call: calls.append(call)
    fitted: object = predictor.fit(history(lora_run(case.steps)))
    expect(fitted is predictor, "fit returns self", repr(fitted))
    found = predict(predictor, case.horizon)
    expect_progress(calls)
    expect(bool(deltas(found)), f"a jump from steps {list(case.steps)}, horizon {case.horizon}", _outcome(found))


@check
def describes_its_prediction(case: PredictorCase) -> None:
    """A prediction has its source, newest step, requested horizon, a known anchor, and numbers as diagnostics.

    Each matrix has an update or a reason in `abstained`; without any update there is a reason in `abstention`. This
    includes runs of one, two or three checkpoints, or of checkpoints that are not evenly spaced.
    """
    for label, run in case.runs():
        for steps, shorter in ((case.steps, run), *case.shortened(run)):
            found, where = case.predict(shorter), f"on {label} with steps {list(steps)}"
            facts = (found.source is shorter, found.step, found.horizon, found.anchor in get_args(Anchor))
            wanted = (True, steps[-1], case.horizon, True)
            expect(facts == wanted, f"(source is the run's, step, horizon, anchor is known) = {wanted} {where}", facts)
            numbers = all(isinstance(key, str) and _is_number(value) for key, value in found.diagnostics.items())
            expect(numbers, f"finite numbers by name as diagnostics {where}", dict(found.diagnostics))
            for name, reason in found.abstained.items():
                expect(name in SHAPES and name not in found.updates, "`abstained` names matrices without update", name)
                expect_text(reason, f"a reason why '{name}' is not predicted")
            if found.abstention is not None:
                expect_text(found.abstention, "`abstention`")
                expect(not found.updates, "an abstention has no updates", sorted(found.updates))
            else:
                expect(bool(found.updates), f"updates or an abstention {where}", "neither")
                silent = sorted(set(SHAPES) - set(found.updates) - set(found.abstained))
                expect(not silent, f"an update or a reason for each matrix {where}", f"neither for {silent}")


@check
def updates_fit_the_run(case: PredictorCase) -> None:
    """Updates are finite, name matrices of the run, have their shapes, and weigh observed steps, in either space."""
    for label, run in (*case.runs(), ("a LoRA run without step 0", lora_run(case.steps, start=False))):
        for variant, predictor in case.variants():
            found = case.predict(run, predictor)
            unknown = sorted({*found.updates, *found.confidence} - set(SHAPES))
            expect(not unknown, f"updates of the matrices of {label}{variant}", f"unknown: {unknown}")
            for name, update in found.updates.items():
                where, weight = f"of '{name}' on {label}{variant}", found.weight(name)
                expect(_is_number(weight) and weight >= 0, f"a confidence {where}: finite, 0 or more", repr(weight))
                if isinstance(update, LowRankUpdate):
                    shape = tuple(update.matrix.shape)
                    expect(shape == SHAPES[name], f"an update of shape {SHAPES[name]} {where}", shape)
                else:
                    unobserved = sorted(set(update.weights) - {0, *run.steps})
                    expect(not unobserved, f"weights of observed steps {where}", f"weights of {unobserved}")
                found.delta(name)  # raises where it is not finite or an applier could not resolve it


@check
def leaves_frozen_matrices_alone(case: PredictorCase) -> None:
    """A matrix that did not move gets no update, or one of zero; where none moved, the predictor abstains."""
    for (label, run), (_, still) in zip(case.runs(), case.runs(moves=False), strict=True):
        moved = FROZEN in deltas(case.predict(run))
        expect(not moved, f"'{FROZEN}', which did not move in {label}, gets no update", "an update moves it")
        found = case.predict(still)
        abstains = bool(found.abstention) and not deltas(found)
        expect(abstains, f"an abstention on {label} in which nothing moved", _outcome(found))


@check
def takes_every_rank(case: PredictorCase) -> None:
    """Histories of rank 1, 2, 3, and of more than a matrix has, are accepted."""
    for _, run in case.runs():
        for rank in (1, 2, 3, 9):
            deltas(case.predict(run, rank=rank))


@check
def is_deterministic(case: PredictorCase) -> None:
    """The global random state does not change a prediction, nor do earlier fits and predictions; bit for bit."""
    for (label, run), (_, other) in zip(case.runs(), case.runs(seed=1), strict=True):
        wanted, used, shared = case.predict(run), case.make(), history(run)
        case.predict(other, used)
        expect_same(wanted, predict(used.fit(shared), case.horizon), f"for {label} after another run", exactly=True)
        predict(used, 2 * case.horizon)
        expect_same(wanted, predict(used, case.horizon), f"for {label} after another horizon", exactly=True)
        expect_same(wanted, predict(used.fit(shared), case.horizon), f"for {label} fitted again", exactly=True)
        with torch.random.fork_rng(devices=[]):
            python, numpy = random.getstate(), np.random.get_state()
            try:
                for seed in (torch.manual_seed, np.random.seed, random.seed):
                    seed(1)
                seeded = case.predict(run)
            finally:
                random.setstate(python)
                np.random.set_state(numpy)
        expect_same(wanted, seeded, f"for {label} with another global random state", exactly=True)


@check
def changes_nothing_else(case: PredictorCase) -> None:
    """The checkpoints, what the history returns, global random states and torch's global settings do not change."""
    for label, run in case.runs():
        one = history(run, 2)

        def read(run: SyntheticRun = run, one: History = one) -> Iterator[tuple[str, Tensor]]:
            yield from run.tensors().items()
            yield from ((f"inner products of {name}", gram) for name, gram in one.grams().items())
            for kind in get_args(DeltaKind):
                for name, factors in one.components(kind, case.horizon if kind == "target" else None).items():
                    yield from ((f"{kind} {part} of {name}", getattr(factors, part)) for part in ("U", "S", "V"))

        kept = {what: value.clone() for what, value in read()}
        with global_state_unchanged():
            predict(case.make().fit(one), case.horizon)
        changed = [what for what, value in read() if not torch.equal(value, kept[what])]
        expect(not changed, f"{label} and its history are left unchanged", f"changed: {', '.join(changed[:3])}")


@check
def does_not_depend_on_signs_and_order(case: PredictorCase) -> None:
    """Equal runs get equal predictions: other signs of u and v, of A and B; other orders of matrices and of ranks."""
    for label, run in case.runs():
        plain = case.predict(run, rank=2)
        flipped = case.predict(run, rank=2, compressor=_RandomSigns())
        expect_same(plain, flipped, f"for {label} with other signs of its singular vectors")
        reordered = case.predict(run.mapped(lambda value: value, tuple(SHAPES)[::-1]), rank=2)
        expect_same(plain, reordered, f"for {label} with its matrices in another order")
    run = lora_run(case.steps)
    for variant, predictor in case.variants():
        plain = case.predict(run, predictor)
        for what, change in (("A and B both negated", _negated), ("rank components in another order", _rolled)):
            expect_same(plain, case.predict(run.mapped(change), predictor), f"with {what}{variant}")


@check
def pickles(case: PredictorCase) -> None:
    """Class, settings, and a predictor before and after `fit` go to another process and predict the same there."""
    run = lora_run(case.steps)
    plain = case.predict(run)
    cls, sent, fitted = (pickle.loads(pickle.dumps(x)) for x in (case.cls, case.make(), case.make().fit(history(run))))
    expect(cls is case.cls, "a pickled class is found by its module and name", repr(cls))
    expect_same(plain, case.predict(run, sent), "after pickling the predictor", exactly=True)
    expect_same(plain, predict(fitted, case.horizon), "after pickling the fitted predictor", exactly=True)


def history(run: SyntheticRun, rank: int = 1, compressor: Compressor | None = None) -> History:
    """Return a history with exact triplets, so that differences between predictions come from the predictor."""
    return History(run, rank, compressor or ExactCompressor())


def predict(fitted: TrajectoryPredictor, horizon: int) -> Prediction:
    """Return the prediction; raise ``CheckError`` for anything else."""
    found: object = fitted.predict(horizon)
    if not isinstance(found, Prediction):
        raise CheckError("predict returns a Prediction", type(found).__name__)
    return found


def deltas(prediction: Prediction) -> dict[str, Tensor]:
    """Return what each matrix that moves moves by at alpha 1, dense (m, n), confidence included."""
    found = {name: dense(prediction.delta(name)).double() for name in prediction.updates}
    return {name: delta for name, delta in found.items() if bool(delta.any())}


def expect_same(before: Prediction, after: Prediction, when: str, exactly: bool = False) -> None:
    """Raise ``CheckError`` unless two predictions move the same matrices equally, bit for bit if ``exactly``."""
    if (before.abstention is None) != (after.abstention is None):
        raise CheckError(f"the same prediction {when}", f"abstention {before.abstention!r}, then {after.abstention!r}")
    first, second = deltas(before), deltas(after)
    if set(first) != set(second):
        raise CheckError(f"the same matrices move {when}", f"{sorted(first)}, then {sorted(second)}")
    for name, was in first.items():
        error = float((second[name] - was).norm() / was.norm())
        if not (torch.equal(was, second[name]) if exactly else error <= TOLERANCE):
            precision = "bit for bit" if exactly else f"to a relative error of {TOLERANCE:g}"
            raise CheckError(f"the same prediction {when}, {precision}", f"'{name}' differs by {error:.2g} (relative)")


class _RecordingHistory(History):
    """A history that records what is read of it."""

    def __init__(self, run: SyntheticRun) -> None:
        self.read: set[str] = set()
        super().__init__(run)

    def inner_products(self, spans: Sequence[Span]) -> Mapping[str, Tensor]:
        self.read.add("gram")
        return super().inner_products(spans)

    def compress(self, *kinds: DeltaKind, horizon: int | None = None) -> None:
        self.read |= set(kinds)
        super().compress(*kinds, horizon=horizon)

    def metrics(self, key: str) -> list[float | None]:
        self.read.add("metrics")
        return super().metrics(key)


class _RandomSigns(ExactCompressor):
    """An SVD whose common signs of u and v are arbitrary, as LAPACK's are."""

    def __init__(self) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(1)

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        return self._flipped(super().compress(deltas, rank))

    def compress_trajectory(
        self, trajectory: LoraTrajectory, spans: Sequence[Span], rank: int, spectrum: bool = False
    ) -> Factors:
        return self._flipped(super().compress_trajectory(trajectory, spans, rank, spectrum))

    def _flipped(self, factors: Factors) -> Factors:
        return factors.flip(1 - 2 * torch.randint(0, 2, factors.S.shape, generator=self._random))


def _negated(value: Weight) -> Weight:
    assert isinstance(value, LoraFactors)
    return LoraFactors(-value.A, -value.B, value.scaling)


def _rolled(value: Weight) -> Weight:
    assert isinstance(value, LoraFactors)
    return LoraFactors(value.A.roll(1, 0), value.B.roll(1, 1), value.scaling)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outcome(found: Prediction) -> str:
    return f"abstention: {found.abstention!r}, updates of {sorted(found.updates)}, abstained: {dict(found.abstained)}"

"""Checks of predictors: the promises of ``TrajectoryPredictor`` and ``Prediction``, tested on tiny runs."""

import itertools
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from next_core.compressors.exact import ExactCompressor
from next_core.history.history import DeltaKind, History
from next_core.interfaces import Compressor, Prediction
from next_core.mathematics.low_rank import Factors, LowRank, dense
from next_core.predictor import TrajectoryPredictor, Work
from next_core.run_config import Guards, Schedule
from next_core.testing import check_runner
from next_core.testing.check_runner import CheckError, checks_of, expect, expect_equal, global_state_unchanged
from next_core.testing.synthetic_runs import FROZEN, SHAPES, SyntheticRun, dense_run, lora_run
from next_core.types import Anchor, LoraFactors, Span

Checked = type[TrajectoryPredictor] | TrajectoryPredictor
TOLERANCE = 1e-3  # Relative error allowed between two forms of one run: networks train in fp32, so rounding differs


class PredictorCase:
    """A predictor's class and settings, and runs on the schedule it recommends."""

    def __init__(self, predictor: Checked) -> None:
        self.plugin = predictor() if isinstance(predictor, type) else predictor
        self.cls: type[TrajectoryPredictor] = type(self.plugin)
        self.schedule = Schedule.model_validate(dict(self.cls.recommended.get("schedule", {})))
        self.horizon = self.schedule.horizon
        # The checkpoints before the first jump of the schedule.
        self.steps = tuple(range(self.schedule.every, self.schedule.observe + 1, self.schedule.every))

    def make(self, **changes: Any) -> TrajectoryPredictor:
        """Return a new predictor of the same settings, with some changed."""
        config = self.plugin.config
        return self.cls(type(config).model_validate(config.model_dump() | changes))

    def variants(self) -> Iterator[tuple[str, TrajectoryPredictor]]:
        """Yield a new predictor and its description; one per space where there is a setting ``space``."""
        has_space = "space" in type(self.plugin.config).model_fields
        for changes in ({"space": "factors"}, {"space": "merged"}) if has_space else ({},):
            yield f" with {changes}" if changes else "", self.make(**changes)

    def runs(self, **changes: Any) -> Iterator[tuple[str, SyntheticRun]]:
        """Yield a run of each kind and its description."""
        yield "a LoRA run", lora_run(self.steps, **changes)
        yield "a full-parameter run", dense_run(self.steps, **changes)

    def predict(self, run: SyntheticRun, predictor: TrajectoryPredictor | None = None, **options: Any) -> Prediction:
        """Fit a predictor (by default a new one) on a run, and predict."""
        return (predictor or self.make()).fit(history(run, **options)).predict(self.horizon)

    def shortened(self, run: SyntheticRun) -> Iterator[tuple[tuple[int, ...], SyntheticRun]]:
        """Yield the run with few or unevenly spaced checkpoints, and their steps."""
        steps = self.steps
        few = (steps[:count] for count in (1, 2, 3, (len(steps) + 1) // 2))
        for kept in (*few, tuple(step for index, step in enumerate(steps) if index % 3 != 1)):
            yield kept, run.only([step for step in run.weights if step == 0 or step in kept])


check = check_runner.checks_for("predictor", PredictorCase)


def check_predictor(predictor: Checked, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check of a predictor: a class, built with default settings, or an instance, rebuilt with its own.

    ``expected_failures`` maps a check to the reason why it fails; one that passes anyway counts as a failure. Raises an
    ``ExceptionGroup`` of all failures, and ``ConfigError`` for an expected failure that names no check.
    """
    check_runner.run_checks("predictor", predictor.name, predictor, expected_failures)


def parametrize_with_checks(predictors: Sequence[Checked]) -> Any:
    """Give a test the arguments ``plugin`` and ``check``, for each predictor and check; it calls ``check(plugin)``."""
    import pytest

    pairs = list(itertools.product(predictors, checks_of("predictor").values()))
    ids = [f"{_label(predictor)}-{check.__name__}" for predictor, check in pairs]
    return pytest.mark.parametrize(("plugin", "check"), pairs, ids=ids)


def _label(predictor: Checked) -> str:
    given = {} if isinstance(predictor, type) else predictor.config.model_dump(exclude_defaults=True)
    fields = ",".join(f"{key}={value}" for key, value in given.items())
    return f"{predictor.name}({fields})" if fields else predictor.name


@check
def recommends_a_schedule_it_can_act_on(case: PredictorCase) -> None:
    """`recommended` has valid fields of `schedule` and `guards`, and on that schedule the predictor can act."""
    Guards.model_validate(dict(case.cls.recommended.get("guards", {}))).check(case.schedule)
    total = case.schedule.observe + case.schedule.settle + case.schedule.every
    case.schedule.check_predictor(case.make(), total)


@check
def declares_what_it_reads_and_costs(case: PredictorCase) -> None:
    """`requires` names all it reads of a history, and `work` is finite: `next-core plan` and `compare` rely on them."""
    required, work = case.cls.requires, case.make().work(SHAPES, case.steps, case.horizon, 2)
    for label, run in case.runs():
        recording = _RecordingHistory(run)
        case.make().fit(recording).predict(case.horizon)
        missing = sorted(recording.read - set(required))
        expect(not missing, f"`requires` names everything read of {label}", f"{missing} is read but not required")
    good = isinstance(work, Work) and all(0 <= x < math.inf for x in (work.flops, work.bytes, work.single_flops))
    expect(good, "a Work with finite numbers, 0 or more", repr(work))


@check
def predicts_on_its_schedule(case: PredictorCase) -> None:
    """On a LoRA run that drifts and bends, some matrix moves; `fit` returns self."""
    predictor = case.make()
    fitted: object = predictor.fit(history(lora_run(case.steps)))
    expect(fitted is predictor, "fit returns self", repr(fitted))
    found = predictor.predict(case.horizon)
    expect(bool(deltas(found)), f"a jump from steps {list(case.steps)}, horizon {case.horizon}", _outcome(found))


@check
def predicts_or_says_why_not(case: PredictorCase) -> None:
    """A prediction has its source, step, horizon, anchor and diagnostics, and for each matrix an update or a reason.

    Without any update there is a reason in `abstention`, as wherever `why_not` gives one before a run. This includes
    runs of one, two or three checkpoints, or of checkpoints that are not evenly spaced.
    """
    for label, run in case.runs():
        for steps, shorter in ((case.steps, run), *case.shortened(run)):
            found, where = case.predict(shorter), f"on {label} with steps {list(steps)}"
            facts = (found.source is shorter, found.step, found.horizon, found.anchor in get_args(Anchor))
            wanted = (True, steps[-1], case.horizon, True)
            expect(facts == wanted, f"(source is the run's, step, horizon, anchor is known) = {wanted} {where}", facts)
            numbers = all(isinstance(key, str) and _is_number(value) for key, value in found.diagnostics.items())
            expect(numbers, f"finite numbers by name as diagnostics {where}", dict(found.diagnostics))
            why_not = [case.make().why_not(given, case.horizon) for given in (steps, list(steps))]
            expect(why_not[0] == why_not[1], f"why_not: the same for a list of steps as for a tuple {where}", why_not)
            if found.abstention is None:
                may = bool(found.updates) and why_not[0] is None
                expect(may, f"an abstention {where}: {why_not[0]}", _outcome(found))
                wrong = [name for name in SHAPES if (name in found.updates) == bool(found.abstained.get(name))]
                expect(not wrong, f"either an update or a reason for each matrix {where}", f"both or neither: {wrong}")
            else:
                good = bool(found.abstention.strip()) and not found.updates
                expect(good, f"a reason and no updates in an abstention {where}", _outcome(found))


@check
def updates_fit_the_run(case: PredictorCase) -> None:
    """Updates are finite, name matrices of the run, have their shapes, and weigh observed steps; at every rank."""
    runs = (*case.runs(), ("a LoRA run without step 0", lora_run(case.steps).only(case.steps)))
    for (label, run), rank in itertools.product(runs, (1, 2, 9)):  # 9 is more than a matrix has
        for variant, predictor in case.variants():
            found, where = case.predict(run, predictor, rank=rank), f"on {label} at rank {rank}{variant}"
            unknown = sorted({*found.updates, *found.confidence} - set(SHAPES))
            expect(not unknown, f"updates of matrices of the run {where}", f"unknown: {unknown}")
            for name in found.updates:
                weight = found.weight(name)  # raises where it is negative
                expect(_is_number(weight), f"a finite confidence of '{name}' {where}", repr(weight))
                found.delta(name)  # raises where a shape or a step is wrong, it is not finite, or cannot be resolved


@check
def reads_no_further_back_than_it_says(case: PredictorCase) -> None:
    """Where `reads_back` is a number of steps, a prediction is the same bit for bit without older checkpoints."""
    for (label, run), (variant, predictor) in itertools.product(case.runs(), list(case.variants())):
        back = predictor.reads_back(case.horizon, case.schedule.every)
        if back is not None:
            oldest = case.steps[-1] - max(back, case.schedule.every)  # a history compares the last two checkpoints
            recent = run.only([step for step in run.weights if step == 0 or step >= oldest])
            before, after = case.predict(run, predictor), case.predict(recent, predictor)
            expect_same(before, after, f"on {label}{variant} without checkpoints before step {oldest}", exactly=True)


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
def is_deterministic(case: PredictorCase) -> None:
    """The global random state does not change a prediction, nor do earlier fits and predictions; bit for bit."""
    for (label, run), (_, other) in zip(case.runs(), case.runs(seed=1), strict=True):
        wanted, used, shared = case.predict(run), case.make(), history(run)
        case.predict(other, used)
        expect_same(wanted, used.fit(shared).predict(case.horizon), f"for {label} after another run", exactly=True)
        used.predict(2 * case.horizon)
        expect_same(wanted, used.predict(case.horizon), f"for {label} after another horizon", exactly=True)
        expect_same(wanted, used.fit(shared).predict(case.horizon), f"for {label} fitted again", exactly=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            seeded = case.predict(run)
        expect_same(wanted, seeded, f"for {label} with another global random state", exactly=True)


@check
def changes_nothing_else(case: PredictorCase) -> None:
    """The checkpoints, what the history returns, global random states and torch's global settings do not change."""
    for label, run in case.runs():
        shared = history(run, 2)
        before = {what: value.clone() for what, value in _contents(run, shared, case.horizon).items()}
        with global_state_unchanged():
            case.make().fit(shared).predict(case.horizon)
        expect_equal(before, _contents(run, shared, case.horizon), f"{label} and its history are left unchanged")


def _contents(run: SyntheticRun, shared: History, horizon: int) -> dict[str, Tensor]:
    """Return every tensor that a predictor can reach: checkpoints, inner products and components."""
    found = run.tensors() | {f"inner products of {name}": gram for name, gram in shared.grams().items()}
    for kind in get_args(DeltaKind):
        for name, factors in shared.components(kind, horizon if kind == "target" else None).items():
            found |= {f"{kind} {part} of {name}": getattr(factors, part) for part in ("U", "S", "V")}
    return found


@check
def does_not_depend_on_signs_and_order(case: PredictorCase) -> None:
    """Equal runs get equal predictions: other signs of u and v, of A and B; other orders of matrices and of ranks."""
    for label, run in case.runs():
        plain = case.predict(run, rank=2)
        flipped = case.predict(run, rank=2, compressor=RandomSigns())
        expect_same(plain, flipped, f"for {label} with other signs of its singular vectors")
        reordered = case.predict(run.mapped(lambda value: value, tuple(SHAPES)[::-1]), rank=2)
        expect_same(plain, reordered, f"for {label} with its matrices in another order")
    run = lora_run(case.steps)
    for variant, predictor in case.variants():
        plain = case.predict(run, predictor)
        for what, same_product in (
            ("A and B both negated", lambda at: LoraFactors(-at.A, -at.B, at.scaling)),
            ("rank components in another order", lambda at: LoraFactors(at.A.roll(1, 0), at.B.roll(1, 1), at.scaling)),
        ):
            expect_same(plain, case.predict(run.mapped(same_product), predictor), f"with {what}{variant}")


@check
def pickles(case: PredictorCase) -> None:
    """Class, settings, and a predictor before and after `fit` go to another process and predict the same there."""
    run = lora_run(case.steps)
    plain = case.predict(run)
    cls, sent, fitted = (pickle.loads(pickle.dumps(x)) for x in (case.cls, case.make(), case.make().fit(history(run))))
    expect(cls is case.cls, "a pickled class is found by its module and name", repr(cls))
    expect_same(plain, case.predict(run, sent), "after pickling the predictor", exactly=True)
    expect_same(plain, fitted.predict(case.horizon), "after pickling the fitted predictor", exactly=True)


def history(run: SyntheticRun, rank: int = 1, compressor: Compressor | None = None) -> History:
    """Return a history with exact triplets, so that differences between predictions come from the predictor."""
    return History(run, rank, compressor or ExactCompressor())


def deltas(prediction: Prediction) -> dict[str, Tensor]:
    """Return what each matrix that moves moves by at alpha 1, dense (m, n), confidence included."""
    found = {name: dense(prediction.delta(name)).double() for name in prediction.updates}
    return {name: delta for name, delta in found.items() if delta.any()}


def expect_same(before: Prediction, after: Prediction, when: str, exactly: bool = False) -> None:
    """Raise ``CheckError`` unless two predictions move the same matrices equally, bit for bit if ``exactly``."""
    first, second = deltas(before), deltas(after)
    same = set(first) == set(second) and (before.abstention is None) == (after.abstention is None)
    expect(same, f"the same prediction {when}", f"{_outcome(before)}, then {_outcome(after)}")
    for name, was in first.items():
        error = float((second[name] - was).norm() / was.norm())
        if not (torch.equal(was, second[name]) if exactly else error <= TOLERANCE):
            precision = "bit for bit" if exactly else f"to a relative error of {TOLERANCE:g}"
            raise CheckError(f"the same prediction {when}, {precision}", f"'{name}' differs by {error:.2g} (relative)")


class _RecordingHistory(History):
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


class RandomSigns(Compressor):
    """An SVD whose common signs of u and v are arbitrary, as LAPACK's are."""

    name = "random-signs"

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)

    def compress(self, deltas: Sequence[LowRank | Tensor], rank: int) -> Factors:
        factors = ExactCompressor().compress(deltas, rank)
        return factors.flip(1 - 2 * torch.randint(0, 2, factors.S.shape, generator=self._random))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outcome(found: Prediction) -> str:
    return f"abstention: {found.abstention!r}, updates of {sorted(found.updates)}, abstained: {dict(found.abstained)}"

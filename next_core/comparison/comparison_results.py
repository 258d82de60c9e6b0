"""What the races show: intervals over seeds, paired differences, the plain step that is as good, ICER, seconds."""

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, model_validator
from scipy.stats import t as student
from sklearn.isotonic import IsotonicRegression

from next_core.comparison.comparison_config import LONGER, PLAIN, Arm, CompareConfig
from next_core.comparison.races import RacePlan, cut_from_longer
from next_core.errors import contradiction
from next_core.process.hardware import hardware, versions

KINDS = ("sampled", "greedy")
SPLITS = ("validation", "test")
Result = Mapping[str, Any]  # The `result.json` of one run
Seeds = Mapping[int, Result]  # The results of one variant by seed
Number = Annotated[float, AllowInfNan(False)]
Accuracies = dict[str, Number | None]  # Accuracy by how answers were taken: sampled, greedy


class Part(BaseModel):
    """A part of a file of results. Unknown keys are ignored, so that files of newer versions can be read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Bounds(Part):
    """A figure and the ends of its 95% interval, which are None for one seed."""

    mean: Number
    low: Number | None = None
    high: Number | None = None


class Interval(Bounds):
    """Mean over seeds with Student's 95% interval; ``values`` by seed."""

    values: Accuracies = {}

    @classmethod
    def of(cls, values: Mapping[Any, float]) -> Self:
        """Take one value per seed. Raises ``ValueError`` without any."""
        mean = statistics.mean(values.values())
        by_seed: Accuracies = {str(seed): value for seed, value in values.items()}
        if len(values) < 2:
            return cls(mean=mean, low=None, high=None, values=by_seed)
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values.values()) / math.sqrt(len(values))
        return cls(mean=mean, low=mean - half, high=mean + half, values=by_seed)


class Line(Part):
    """Means along a curve, with their intervals; ``values`` by seed."""

    mean: list[Number | None]
    low: list[Number | None] | None = None
    high: list[Number | None] | None = None
    values: dict[str, list[Number | None]] = {}


class Curve(Part):
    """Accuracies along the runs of an arm, by kind."""

    steps: list[int]
    seconds: list[Number | None]
    validation: dict[str, Line] = {}
    test: dict[str, Line] = {}

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        columns: list[Any] = [self.seconds]
        for line in self.test.values():
            columns += [line.mean, line.low, line.high, *line.values.values()]
        if any(column is not None and len(column) != len(self.steps) for column in columns):
            raise ValueError(f"every column must have {len(self.steps)} points, as many as steps")
        return self


class VariantResult(Part):
    """One combination of the values that an arm chooses among, with its final accuracies."""

    values: dict[str, Any]
    validation: Interval | None = None
    test: Interval | None = None
    chosen: bool = False


class ArmResult(Part):
    """The figures of one arm, of the variant that validation chose; docs/compare.md defines each.

    ``icer`` are RL steps for each point of accuracy gained: of the mean gain and of the ends of its interval.
    """

    role: Literal["plain", "control", "arm"]
    predictor: str
    chosen: dict[str, Any] = {}
    variants: list[VariantResult] = []
    steps: int
    spent_steps: int | None = None
    validation: dict[str, Interval | None] = {}
    test: dict[str, Interval | None] = {}
    difference: Interval | None = None
    difference_longer: Interval | None = None
    equals_step: Interval | None = None
    beyond: int = 0
    steps_saved: Interval | None = None
    icer: Bounds | None = None
    seconds: Interval | None = None
    seconds_saved: Interval | None = None
    ours_seconds: Interval | None = None
    curve: Curve | None = None
    jumps: Mapping[str, Sequence[Any]] = {}


class Comparison(Part):
    """``compare.json``: the facts of the whole comparison, and all arms, ``plain`` first."""

    versions: dict[str, str] = {}
    hardware: str = ""
    about: dict[str, Any] = {}
    """What was trained: date, model, task, algorithm and learning rate of the plain runs."""
    config: dict[str, Any] = {}
    steps: int
    longer: int | None = None
    seeds: list[int]
    metric: str
    rollouts_per_step: int | None = None
    base: dict[str, Accuracies] = {}
    steps_run: int | None = None
    steps_shared: int | None = None
    failed: dict[str, str] = {}
    arms: Mapping[str, ArmResult] = Field(min_length=1)

    def as_dict(self) -> dict[str, Any]:
        """Return plain objects for JSON, with the keys that docs/compare.md lists."""
        return self.model_dump()

    def __repr__(self) -> str:
        ends = {name: arm.test.get(self.metric) for name, arm in self.arms.items()}
        means = [f"{name} {end.mean:.3f}" for name, end in ends.items() if end is not None]
        return f"<Comparison over {len(self.seeds)} seeds; {', '.join(means)}>"


def collect(
    config: CompareConfig, arms: Sequence[Arm], results: Mapping[str, Result], plan: RacePlan, failed: Mapping[str, str]
) -> Comparison:
    """Judge complete variants by the races' results, by folder. ``ConfigError`` where ``metric`` was not measured."""
    found: dict[tuple[str, int], dict[int, Result]] = {}
    for race in plan.races:
        if race.folder in results:
            _check_measured(results[race.folder], config.metric, race.title)
            found.setdefault((race.arm, race.variant), {})[race.config.seed] = results[race.folder]
    found = {key: seeds for key, seeds in found.items() if len(seeds) == len(config.seeds)}
    if cut_from_longer(arms):
        found[PLAIN, 0] = {seed: _cut(result, config.steps) for seed, result in found[LONGER, 0].items()}
    plain = found[PLAIN, 0]
    longest = found.get((LONGER, 0), plain)
    training = arms[0].variants[0].config.training
    about = {"model": str(training.model), "task": str(training.data.train), "algorithm": training.algorithm}
    return Comparison(
        versions=versions(),
        hardware=hardware(),
        about={"date": datetime.date.today().isoformat(), **about, "learning_rate": training.learning_rate},
        config=config.model_dump(mode="json"),
        steps=config.steps,
        longer=config.longer,
        seeds=list(config.seeds),
        metric=config.metric,
        rollouts_per_step=training.prompts_per_step * training.generations,
        base={split: next(iter(plain.values()))["curve"][0][split] for split in SPLITS},
        steps_run=plan.steps,
        steps_shared=plan.shared,
        failed=dict(failed),
        arms={arm.name: _judge(arm, found, plain, longest, config.metric) for arm in arms},
    )


def _judge(arm: Arm, found: Mapping[tuple[str, int], Seeds], plain: Seeds, longest: Seeds, metric: str) -> ArmResult:
    complete = {index: found[arm.name, index] for index in range(len(arm.variants)) if (arm.name, index) in found}
    # Values are chosen on the validation prompts; the test prompts are looked at once.
    validation = {index: Interval.of(_final(seeds, "validation", metric)) for index, seeds in complete.items()}
    best = max(validation, key=lambda index: validation[index].mean)
    seeds, steps, is_plain = complete[best], arm.variants[best].config.steps, arm.name == PLAIN
    test = _final(seeds, "test", metric)
    placed = {seed: equals_step(test[seed], longest[seed]["curve"], metric) for seed in seeds}
    equals = {seed: step for seed, (step, _) in placed.items()}
    seconds = {seed: float(result["curve"][-1]["seconds"]) for seed, result in seeds.items()}

    def difference(against: Seeds) -> Interval:
        other = _final(against, "test", metric)
        return Interval.of({seed: value - other[seed] for seed, value in test.items()})

    variants = []
    for index, one in complete.items():
        values, tested = dict(arm.variants[index].values), Interval.of(_final(one, "test", metric))
        variants.append(VariantResult(values=values, validation=validation[index], test=tested, chosen=index == best))
    return ArmResult(
        role=arm.role,
        predictor=arm.variants[best].config.predictor.name,
        chosen=dict(arm.variants[best].values),
        variants=variants,
        steps=steps,
        spent_steps=sum(variant.config.steps for variant in arm.variants),
        validation={kind: Interval.of(_final(seeds, "validation", kind)) for kind in _kinds(seeds, "validation")},
        test={kind: Interval.of(_final(seeds, "test", kind)) for kind in _kinds(seeds, "test")},
        difference=None if is_plain else difference(plain),
        difference_longer=None if longest is plain or is_plain else difference(longest),
        equals_step=Interval.of(equals),
        beyond=sum(beyond for _, beyond in placed.values()),
        steps_saved=Interval.of({seed: step - steps for seed, step in equals.items()}),
        icer=_icer(steps, {seed: test[seed] - _value(seeds[seed]["curve"][0]["test"][metric]) for seed in seeds}),
        seconds=Interval.of(seconds),
        seconds_saved=Interval.of({s: _seconds_until(longest[s], equals[s]) - seconds[s] for s in seeds}),
        ours_seconds=Interval.of({seed: float(result["seconds"]["ours"]) for seed, result in seeds.items()}),
        curve=_curve(seeds),
        jumps={str(seed): result["jumps"] for seed, result in seeds.items()},
    )


def _cut(result: Result, steps: int) -> dict[str, Any]:
    """Return the beginning of a plain run, up to ``steps``."""
    curve = [point for point in result["curve"] if point["step"] <= steps]
    return {**result, "curve": curve, "seconds": {**result["seconds"], "ours": 0.0}}


def _check_measured(result: Result, metric: str, title: str) -> None:
    there = set.intersection(*(set(point[split]) for point in result["curve"] for split in SPLITS))
    if metric not in there:
        known = f"accuracy '{metric}' was not measured, but {', '.join(sorted(there)) or 'nothing'}"
        raise contradiction(f"{title}: {known}; change metric and repeat the command: no run is repeated")


def _value(accuracy: float | None) -> float:
    """A policy whose accuracy is not a number answers nothing right."""
    return 0.0 if accuracy is None else float(accuracy)


def _final(seeds: Seeds, split: str, kind: str) -> dict[int, float]:
    return {seed: _value(result["curve"][-1][split][kind]) for seed, result in seeds.items()}


def _kinds(seeds: Seeds, split: str) -> list[str]:
    points = [result["curve"][-1][split] for result in seeds.values()]
    return [kind for kind in KINDS if all(kind in point for point in points)]


def equals_step(accuracy: float, curve: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, bool]:
    """Return the first RL step at which a plain run, made monotone, is as accurate; its last and True if never."""
    steps = [point["step"] for point in curve]
    values = np.array([_value(point["test"][metric]) for point in curve])
    rising = IsotonicRegression().fit_transform(np.asarray(steps, float), values)
    if accuracy > rising[-1]:
        return float(steps[-1]), True
    if accuracy <= rising[0]:
        return float(steps[0]), False
    after = int(np.searchsorted(rising, accuracy, side="left"))
    below, above = rising[after - 1], rising[after]
    step = steps[after - 1] + (steps[after] - steps[after - 1]) * (accuracy - below) / (above - below)
    return float(step), False


def _seconds_until(result: Result, step: float) -> float:
    points = result["curve"]
    return float(np.interp(step, [p["step"] for p in points], [p["seconds"] for p in points]))


def _icer(steps: int, gains: Mapping[int, float]) -> Bounds | None:
    """Return RL steps for each point of accuracy gained (arXiv 2604.11446); None unless the mean gain is above 0."""
    gain = Interval.of(gains)
    mean, low, high = (steps / (100 * g) if g is not None and g > 0 else None for g in (gain.mean, gain.high, gain.low))
    return None if mean is None else Bounds(mean=mean, low=low, high=high)


def _curve(seeds: Seeds) -> Curve:
    """Return mean and interval over seeds at the points that all of them have."""
    by_step = {seed: {p["step"]: p for p in result["curve"]} for seed, result in seeds.items()}
    steps = sorted(set.intersection(*(set(points) for points in by_step.values())))

    def line(split: str, kind: str) -> Line:
        over = [Interval.of({s: _value(p[step][split][kind]) for s, p in by_step.items()}) for step in steps]
        values: Any = {str(seed): [_value(p[step][split][kind]) for step in steps] for seed, p in by_step.items()}
        return Line(mean=[p.mean for p in over], low=[p.low for p in over], high=[p.high for p in over], values=values)

    validation, test = ({kind: line(split, kind) for kind in _kinds(seeds, split)} for split in SPLITS)
    seconds: list[float | None] = [statistics.mean(at[step]["seconds"] for at in by_step.values()) for step in steps]
    return Curve(steps=steps, seconds=seconds, validation=validation, test=test)

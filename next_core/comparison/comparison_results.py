"""What the races show: intervals over seeds, paired differences, the plain step that is as good, ICER, seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student
from sklearn.isotonic import IsotonicRegression

from next_core.comparison.comparison_config import LONGER, PLAIN, Arm, CompareConfig
from next_core.comparison.races import RacePlan, cut_from_longer
from next_core.errors import ConfigError
from next_core.process.hardware import hardware, versions

KINDS = ("sampled", "greedy")
SPLITS = ("validation", "test")
Result = Mapping[str, Any]
"""The ``result.json`` of one run."""
Seeds = Mapping[int, Result]
"""The results of one variant by seed."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with Student's 95% interval, whose ends are None for one seed; ``values`` by seed."""

    mean: float
    low: float | None
    high: float | None
    values: Mapping[str, float]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Interval:
        """Take one value per seed. Raises ``ValueError`` without any."""
        mean, by_seed = statistics.mean(values.values()), {str(seed): value for seed, value in values.items()}
        if len(values) < 2:
            return cls(mean, None, None, by_seed)
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values.values()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, by_seed)


@dataclass(frozen=True)
class VariantResult:
    """One combination of the values that an arm chooses among, with its final accuracies."""

    values: Mapping[str, Any]
    validation: Interval
    test: Interval
    chosen: bool


@dataclass(frozen=True)
class Icer:
    """RL steps for each point of accuracy gained: of the mean gain and the ends of its interval."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ArmResult:
    """The figures of one arm, of the variant that validation chose; docs/compare.md defines each."""

    role: str
    predictor: str
    chosen: Mapping[str, Any]
    variants: Sequence[VariantResult]
    steps: int
    spent_steps: int
    validation: Mapping[str, Interval]
    test: Mapping[str, Interval]
    difference: Interval | None
    difference_longer: Interval | None
    equals_step: Interval
    beyond: int
    steps_saved: Interval
    icer: Icer | None
    seconds: Interval
    seconds_saved: Interval
    ours_seconds: Interval
    curve: Mapping[str, Any]
    jumps: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """All arms, ``plain`` first, and the facts of the whole comparison."""

    facts: Mapping[str, Any]
    arms: Mapping[str, ArmResult]

    def as_dict(self) -> dict[str, Any]:
        """Return plain objects for JSON, with the keys that docs/compare.md lists."""
        return {**self.facts, "arms": {name: asdict(arm) for name, arm in self.arms.items()}}

    def __repr__(self) -> str:
        means = [f"{name} {arm.test[self.facts['metric']].mean:.3f}" for name, arm in self.arms.items()]
        return f"<Comparison over {len(self.facts['seeds'])} seeds; {', '.join(means)}>"


def collect(
    config: CompareConfig, arms: Sequence[Arm], results: Mapping[str, Result], plan: RacePlan, failed: Mapping[str, str]
) -> Comparison:
    """Judge the arms by the results of the races, given by their folders; a variant that lacks one is left out.

    Raises ``ConfigError`` where the accuracy that decides was not measured.
    """
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
    facts = {
        "versions": versions(),
        "hardware": hardware(),
        "config": config.model_dump(mode="json"),
        "steps": config.steps,
        "longer": config.longer,
        "seeds": list(config.seeds),
        "metric": config.metric,
        "rollouts_per_step": training.prompts_per_step * training.generations,
        "base": {split: next(iter(plain.values()))["curve"][0][split] for split in SPLITS},
        "steps_run": plan.steps,
        "steps_shared": plan.shared,
        "failed": dict(failed),
    }
    return Comparison(facts, {arm.name: _judge(arm, found, plain, longest, config.metric) for arm in arms})


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

    return ArmResult(
        role=arm.role,
        predictor=arm.variants[best].config.predictor.name,
        chosen=dict(arm.variants[best].values),
        variants=[
            VariantResult(
                dict(arm.variants[index].values),
                validation[index],
                Interval.of(_final(one, "test", metric)),
                index == best,
            )
            for index, one in complete.items()
        ],
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
        curve=_curves(seeds),
        jumps={str(seed): result["jumps"] for seed, result in seeds.items()},
    )


def _cut(result: Result, steps: int) -> dict[str, Any]:
    """Return the beginning of a plain run, up to ``steps``."""
    curve = [point for point in result["curve"] if point["step"] <= steps]
    return {**result, "curve": curve, "seconds": {**result["seconds"], "ours": 0.0}}


def _check_measured(result: Result, metric: str, title: str) -> None:
    there = set.intersection(*(set(point[split]) for point in result["curve"] for split in SPLITS))
    if metric not in there:
        known = ", ".join(sorted(there)) or "nothing"
        raise ConfigError(
            f"{title}: accuracy '{metric}' was not measured, but {known}; change metric and repeat the command: no run "
            "is repeated",
            kind="config-contradiction",
        )


def _value(accuracy: float | None) -> float:
    """A policy whose accuracy is not a number answers nothing right."""
    return 0.0 if accuracy is None else float(accuracy)


def _final(seeds: Seeds, split: str, kind: str) -> dict[int, float]:
    return {seed: _value(result["curve"][-1][split][kind]) for seed, result in seeds.items()}


def _kinds(seeds: Seeds, split: str) -> list[str]:
    points = [result["curve"][-1][split] for result in seeds.values()]
    return [kind for kind in KINDS if all(kind in point for point in points)]


def equals_step(accuracy: float, curve: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, bool]:
    """Return the first RL step at which a plain run, its test curve made monotone, is as accurate.

    Where it never is: its last step, and True.
    """
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


def _icer(steps: int, gains: Mapping[int, float]) -> Icer | None:
    """Return RL steps for each point of accuracy gained (arXiv 2604.11446); None unless the mean gain is above 0."""
    gain = Interval.of(gains)
    mean, low, high = (steps / (100 * g) if g is not None and g > 0 else None for g in (gain.mean, gain.high, gain.low))
    return None if mean is None else Icer(mean, low, high)


def _curves(seeds: Seeds) -> dict[str, Any]:
    """Return mean and interval over seeds at the points that all of them have."""
    by_step = {seed: {p["step"]: p for p in result["curve"]} for seed, result in seeds.items()}
    steps = sorted(set.intersection(*(set(points) for points in by_step.values())))
    seconds = [statistics.mean(points[step]["seconds"] for points in by_step.values()) for step in steps]
    found: dict[str, Any] = {"steps": steps, "seconds": seconds}
    for split in SPLITS:
        found[split] = {}
        for kind in _kinds(seeds, split):
            over = [Interval.of({s: _value(p[step][split][kind]) for s, p in by_step.items()}) for step in steps]
            found[split][kind] = {end: [getattr(one, end) for one in over] for end in ("mean", "low", "high")}
    return found

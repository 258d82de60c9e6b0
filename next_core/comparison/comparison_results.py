"""What the races say: intervals over seeds, paired differences, the plain step that is as good, ICER, seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
Seeds = Mapping[int, Result]
"""The results of one variant by seed: those of ``RunResult``."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with Student's 95% interval; None for its ends with one seed."""

    mean: float
    low: float | None
    high: float | None
    values: Mapping[int, float]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Interval:
        """Of one value a seed. Raises ``ValueError`` without any."""
        mean = statistics.mean(values.values())
        if len(values) < 2:
            return cls(mean, None, None, dict(values))
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values.values()) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, dict(values))

    def as_dict(self) -> dict[str, Any]:
        by_seed = {str(seed): value for seed, value in self.values.items()}
        return {"mean": self.mean, "low": self.low, "high": self.high, "values": by_seed}


@dataclass(frozen=True)
class Comparison:
    """All arms, ``plain`` first, as docs/compare.md lists their keys."""

    facts: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Plain objects, for JSON."""
        return {**self.facts, "arms": {name: dict(arm) for name, arm in self.arms.items()}}


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
        longer = found[LONGER, 0]
        found[PLAIN, 0] = {seed: _cut(result, config.steps) for seed, result in longer.items()}
    plain = found[PLAIN, 0]
    longest = found.get((LONGER, 0), plain)
    judged = {}
    for arm in arms:
        variants = {i: found[arm.name, i] for i in range(len(arm.variants)) if (arm.name, i) in found}
        judged[arm.name] = _judge(arm, variants, plain, longest, config)
    training = arms[0].variants[0].config.training
    any_plain = next(iter(plain.values()))
    facts = {
        "versions": versions(),
        "hardware": hardware(),
        "config": config.model_dump(mode="json"),
        "steps": config.steps,
        "longer": config.longer,
        "seeds": list(config.seeds),
        "metric": config.metric,
        "rollouts_per_step": training.prompts_per_step * training.generations,
        "base": {split: any_plain["curve"][0][split] for split in SPLITS},
        "steps_run": plan.steps,
        "steps_shared": plan.shared,
        "failed": dict(failed),
    }
    return Comparison(facts, judged)


def _judge(
    arm: Arm, variants: Mapping[int, Seeds], plain: Seeds, longest: Seeds, config: CompareConfig
) -> dict[str, Any]:
    metric = config.metric
    # What is chosen is chosen on the validation prompts; the test prompts are looked at once.
    by_validation = {i: Interval.of(_final(seeds, "validation", metric)) for i, seeds in variants.items()}
    best = max(by_validation, key=lambda index: by_validation[index].mean)
    chosen, seeds = arm.variants[best], variants[best]
    steps = chosen.config.steps
    test = _final(seeds, "test", metric)
    placed = {seed: equals_step(test[seed], _curve(longest[seed], metric)) for seed in seeds}
    equals = {seed: step for seed, (step, _) in placed.items()}
    seconds = {seed: float(result["curve"][-1]["seconds"]) for seed, result in seeds.items()}
    saved = {seed: _seconds_until(longest[seed], equals[seed]) - seconds[seed] for seed in seeds}
    is_plain = arm.name == PLAIN
    return {
        "role": arm.role,
        "predictor": chosen.config.predictor.name,
        "chosen": dict(chosen.values),
        "variants": [
            {
                "values": dict(variant.values),
                "validation": by_validation[index].as_dict(),
                "test": Interval.of(_final(variants[index], "test", metric)).as_dict(),
                "chosen": index == best,
            }
            for index, variant in enumerate(arm.variants)
            if index in variants
        ],
        "steps": steps,
        "spent_steps": sum(variant.config.steps for variant in arm.variants),
        **{
            split: {kind: Interval.of(_final(seeds, split, kind)).as_dict() for kind in _kinds(seeds, split)}
            for split in SPLITS
        },
        "difference": None if is_plain else _difference(test, plain, metric),
        "difference_longer": None if longest is plain or is_plain else _difference(test, longest, metric),
        "equals_step": Interval.of(equals).as_dict(),
        "beyond": sum(beyond for _, beyond in placed.values()),
        "steps_saved": Interval.of({seed: step - steps for seed, step in equals.items()}).as_dict(),
        "icer": _icer(steps, {seed: test[seed] - _start(seeds[seed], metric) for seed in seeds}),
        "seconds": Interval.of(seconds).as_dict(),
        "seconds_saved": Interval.of(saved).as_dict(),
        "ours_seconds": Interval.of({seed: float(r["seconds"]["ours"]) for seed, r in seeds.items()}).as_dict(),
        "curve": _curves(seeds),
        "jumps": {str(seed): result["jumps"] for seed, result in seeds.items()},
    }


def _cut(result: Result, steps: int) -> dict[str, Any]:
    """The beginning of a plain run, up to ``steps``."""
    curve = [point for point in result["curve"] if point["step"] <= steps]
    return {**result, "curve": curve, "seconds": {**result["seconds"], "ours": 0.0}}


def _check_measured(result: Result, metric: str, title: str) -> None:
    there = set.intersection(*(set(point[split]) for point in result["curve"] for split in SPLITS))
    if metric not in there:
        known = ", ".join(sorted(there)) or "nothing"
        raise ConfigError(
            f"{title}: accuracy '{metric}' was not measured, but {known}; change metric, and run the same command "
            "again: no race is run anew"
        )


def _value(accuracy: float | None) -> float:
    """A policy whose accuracy is not a number answers nothing right."""
    return 0.0 if accuracy is None else float(accuracy)


def _final(seeds: Seeds, split: str, kind: str) -> dict[int, float]:
    return {seed: _value(result["curve"][-1][split][kind]) for seed, result in seeds.items()}


def _start(result: Result, kind: str) -> float:
    return _value(result["curve"][0]["test"][kind])


def _kinds(seeds: Seeds, split: str) -> list[str]:
    points = [result["curve"][-1][split] for result in seeds.values()]
    return [kind for kind in KINDS if all(kind in point for point in points)]


def _difference(test: Mapping[int, float], against: Seeds, metric: str) -> dict[str, Any]:
    other = _final(against, "test", metric)
    return Interval.of({seed: value - other[seed] for seed, value in test.items()}).as_dict()


def _curve(result: Result, kind: str) -> tuple[list[int], list[float]]:
    return [p["step"] for p in result["curve"]], [_value(p["test"][kind]) for p in result["curve"]]


def equals_step(accuracy: float, curve: tuple[Sequence[int], Sequence[float]]) -> tuple[float, bool]:
    """The first RL step at which a plain run, its curve made monotone, is as accurate.

    Where it never is: its last step, and True.
    """
    steps, values = curve
    rising = IsotonicRegression().fit_transform(np.asarray(steps, float), np.asarray(values, float))
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


def _icer(steps: int, gains: Mapping[int, float]) -> dict[str, float | None] | None:
    """RL steps for each point of accuracy gained (arXiv 2604.11446): of the mean gain and the ends of its interval."""
    gain = Interval.of(gains)

    def of(value: float | None) -> float | None:
        return None if value is None or value <= 0 else steps / (100 * value)

    return None if of(gain.mean) is None else {"mean": of(gain.mean), "low": of(gain.high), "high": of(gain.low)}


def _curves(seeds: Seeds) -> dict[str, Any]:
    """Mean and interval over seeds at the points that all of them have."""
    by_step = {seed: {p["step"]: p for p in result["curve"]} for seed, result in seeds.items()}
    steps = sorted(set.intersection(*(set(points) for points in by_step.values())))
    found: dict[str, Any] = {
        "steps": steps,
        "seconds": [statistics.mean(points[step]["seconds"] for points in by_step.values()) for step in steps],
    }
    for split in SPLITS:
        found[split] = {}
        for kind in _kinds(seeds, split):
            over = [
                Interval.of({s: _value(points[step][split][kind]) for s, points in by_step.items()}) for step in steps
            ]
            found[split][kind] = {end: [getattr(one, end) for one in over] for end in ("mean", "low", "high")}
    return found

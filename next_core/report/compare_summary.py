"""What a comparison says in short: its main figures and a few sentences."""

from __future__ import annotations

import statistics

from scipy.stats import t as student

from next_core.report.inputs import Arm, Comparison, Interval
from next_core.report.page import Tile
from next_core.report.words import NOTHING, counted, figure, listed, settings, signed, span

Named = tuple[str, Arm]


def value(arm: Arm, comparison: Comparison) -> Interval | None:
    """An arm's accuracy on the test prompts, of the kind that decides."""
    return arm.test.get(comparison.metric)


def above(arm: Arm) -> bool:
    """Whether an arm beats plain RL with its whole interval."""
    return arm.difference is not None and arm.difference.low is not None and arm.difference.low > 0


def best_of(comparison: Comparison) -> Named | None:
    """Of the arms that are no control the one with the highest mean accuracy."""
    known = [(name, arm) for name, arm in comparison.arms.items() if arm.role == "arm"]
    judged = [(end.mean, name, arm) for name, arm in known if (end := value(arm, comparison)) is not None]
    return max(judged, key=lambda one: one[0])[1:] if judged else None


def tuned_of(comparison: Comparison) -> Named | None:
    """The plain run whose settings were chosen, such as the learning rate."""
    found = ((name, arm) for name, arm in comparison.arms.items() if arm.role == "control" and arm.chosen)
    return next(found, None)


def plain_of(comparison: Comparison, steps: int | None) -> Named | None:
    """The plain run of so many steps."""
    found = ((name, arm) for name, arm in comparison.arms.items() if arm.role == "plain" and arm.steps == steps)
    return next(found, None)


def paired(one: Interval, other: Interval) -> Interval | None:
    """The mean of one minus other over the seeds that both have, with Student's 95% interval."""
    each: list[float] = []
    for seed, mine in one.values.items():
        against = other.values.get(seed)
        if mine is not None and against is not None:
            each.append(mine - against)
    if len(each) < 2:
        return Interval(mean=each[0]) if each else None
    middle = statistics.fmean(each)
    half = float(student.ppf(0.975, len(each) - 1)) * statistics.stdev(each) / len(each) ** 0.5
    return Interval(mean=middle, low=middle - half, high=middle + half)


def with_span(interval: Interval | None) -> str:
    """+0.12 (95% +0.08 to +0.16)."""
    if interval is None:
        return NOTHING
    between = span(interval, signed)
    return f"{signed(interval.mean)} (95% {between})" if between else signed(interval.mean)


def summary(comparison: Comparison) -> list[str]:
    """Which arms beat plain RL, and how the best compares with the controls that cost more."""
    arms = {name: arm for name, arm in comparison.arms.items() if arm.role == "arm"}
    plain, best = plain_of(comparison, comparison.steps), best_of(comparison)
    start = None if plain is None else value(plain[1], comparison)
    reached = "" if start is None else f" Plain RL reaches {figure(start.mean)}."
    ahead = [name for name, arm in arms.items() if above(arm)]
    higher = [name for name, arm in arms.items() if arm.difference is not None and arm.difference.mean > 0]
    told = []
    if not arms:
        told.append(f"There is no arm beside plain RL and its controls.{reached}")
    elif len(comparison.seeds) == 1:
        told.append(
            f"{len(higher)} of {counted(len(arms), 'arm')} {'ends' if len(higher) == 1 else 'end'} above plain RL "
            f"after {comparison.steps} steps{_these(higher)}.{reached} One seed gives no intervals: "
            "small differences may be noise."
        )
    else:
        told.append(
            f"{len(ahead)} of {counted(len(arms), 'arm')} {'beats' if len(ahead) == 1 else 'beat'} plain RL after "
            f"{comparison.steps} steps with the whole 95% interval of the paired difference{_these(ahead)}.{reached}"
        )
    if best is not None:
        told.append(_of_best(comparison, *best))
    tuned = tuned_of(comparison)
    beating = [name for name, arm in comparison.arms.items() if arm.role == "control" and above(arm)]
    beating = [name for name in beating if tuned is None or name != tuned[0]]
    if beating:
        told.append(f"Beware: {listed(beating)}, meant as a control, beats plain RL as well.")
    return told


def _these(names: list[str]) -> str:
    return f": {listed(names)}" if names else ""


def _of_best(comparison: Comparison, name: str, arm: Arm) -> str:
    end = value(arm, comparison)
    assert end is not None  # or it is not the best
    parts = [f"The best, {name}, reaches {figure(end.mean)}: {with_span(arm.difference)} against plain RL"]
    if arm.difference_longer is not None and comparison.longer is not None:
        parts.append(f"{with_span(arm.difference_longer)} against plain RL of {comparison.longer} steps")
    tuned = tuned_of(comparison)
    against = None if tuned is None else value(tuned[1], comparison)
    if tuned is not None and against is not None:
        chosen = settings(tuned[1].chosen)
        parts.append(f"{with_span(paired(end, against))} against plain RL tuned on the validation prompts ({chosen})")
    return f"{', '.join(parts)}."


def tiles(comparison: Comparison) -> list[Tile]:
    """The accuracy before RL, of the plain runs, and of the best arm."""
    found = []
    before = comparison.base.get("test", {}).get(comparison.metric)
    if before is not None:
        found.append(Tile(figure(before), "before RL"))
    best = best_of(comparison)
    for named, words in (
        (plain_of(comparison, comparison.steps), f"plain RL, {comparison.steps} steps"),
        (plain_of(comparison, comparison.longer), f"plain RL, {comparison.longer} steps"),
        (tuned_of(comparison), "plain RL, tuned"),
        (best, "" if best is None else f"best arm: {best[0]}"),
    ):
        end = None if named is None else value(named[1], comparison)
        if end is not None:
            found.append(Tile(figure(end.mean), words))
    return found

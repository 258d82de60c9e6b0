"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from next_core.comparison.comparison_results import Interval
from next_core.report import pictures
from next_core.report.formatting import as_yaml, counted, decimal, listed, reasons, steps_text, values_text, with_span
from next_core.report.inputs import Arm, Comparison, Jump
from next_core.report.page import Page

SECTIONS = {
    "accuracy": "Accuracy",
    "cost": "Savings and costs",
    "chosen": "Choices on the validation prompts",
    "jumps": "Jumps",
    "setup": "Setup",
}
KINDS = ("sampled", "greedy")
"""Kinds of accuracy, in the order of the table."""
MOST_REASONS = 3
"""Reasons for refused jumps that an arm lists; the rest are counted together."""


def compare_page(comparison: Comparison, title: str) -> Page:
    """Return everything that ``compare.json`` says."""
    arms, rollouts = comparison.arms, comparison.rollouts_per_step
    parts = [counted(len(arms), "arm"), f"{comparison.steps} RL steps", counted(len(comparison.seeds), "seed")]
    parts += [f"{rollouts} rollouts per step"] if rollouts else []
    subtitle = f"Comparison of {', '.join(parts)}"
    ends = Ends.of(comparison)
    page = Page("compare.html", title, subtitle, _summary(comparison, ends), _tiles(comparison, ends), SECTIONS)
    page.draw("differences", 3.0, pictures.differences, comparison, what="Differences to plain RL")
    page.draw("curves-over-steps", 4.6, pictures.curves, comparison, "steps", what="Accuracy over RL steps")
    over_seconds = "Accuracy over seconds of training"
    page.draw("curves-over-seconds", 4.6, pictures.curves, comparison, "seconds", what=over_seconds)
    page.draw("multiples", 3.4, pictures.multiples, {name: list(arm.jumps.values()) for name, arm in arms.items()})
    jumping = {name: arm for name, arm in arms.items() if arm.jump_log}
    chosen = {name: arm for name, arm in arms.items() if len(arm.variants) > 1}
    if not chosen:
        page.missing["Choices"] = "every arm ran with one setting, so there was nothing to choose"
    if not jumping:
        page.missing["Jumps"] = "no arm attempted one"
    if not comparison.config:
        page.missing["Config"] = "compare.json holds none"
    measured = {kind for arm in arms.values() for kind in arm.test}
    multiples = [jump.multiple or 0.0 for arm in arms.values() for jump in arm.jump_log]
    page.facts = {
        "comparison": comparison,
        "metric": comparison.metric,
        "kinds": list(dict.fromkeys(kind for kind in [*KINDS, *sorted(measured)] if kind in measured)),
        "shown": {name: arm for name, arm in arms.items() if arm.difference is not None and arm.role != "plain"},
        "ends": ends.accuracy,
        "beyond": {name: arm.beyond for name, arm in arms.items() if arm.beyond},
        "chosen": chosen,
        "jumping": jumping,
        "refusals": [refusal for name, arm in jumping.items() for refusal in _refusals(name, arm.jump_log)],
        "highest_multiple": max(multiples, default=0.0),
        "config": as_yaml(comparison.config),
        "above": above,
    }
    return page


def above(arm: Arm) -> bool:
    """Return whether an arm beats plain RL with its whole interval."""
    return arm.difference is not None and arm.difference.low is not None and arm.difference.low > 0


def paired(one: Interval, other: Interval) -> Interval | None:
    """Return the mean of one minus other over the seeds that both have, with Student's 95% interval."""
    each = {
        seed: mine - against
        for seed, mine in one.values.items()
        if mine is not None and (against := other.values.get(seed)) is not None
    }
    return Interval.of(each) if each else None


class Ends(NamedTuple):
    """The final accuracies by arm, and which arms are plain RL, longer, tuned, and the best of those that jump."""

    accuracy: dict[str, Interval]
    plain: str | None
    longer: str | None
    tuned: str | None
    best: str | None

    @classmethod
    def of(cls, comparison: Comparison) -> Self:
        """Find them; None where there is none with an accuracy."""
        arms = comparison.arms
        ends = {name: end for name, arm in arms.items() if (end := arm.test.get(comparison.metric)) is not None}
        plain = {arms[name].steps: name for name in ends if arms[name].role == "plain"}
        tuned = [name for name in ends if arms[name].role == "control" and arms[name].chosen]
        best = max((name for name in ends if arms[name].role == "arm"), key=lambda name: ends[name].mean, default=None)
        return cls(ends, plain.get(comparison.steps), plain.get(comparison.longer or 0), next(iter(tuned), None), best)

    def mean(self, name: str) -> str:
        """Return an arm's accuracy as text."""
        return decimal(self.accuracy[name].mean)


def _summary(comparison: Comparison, ends: Ends) -> list[str]:
    """Say which arms beat plain RL, and how the best one compares with the controls that cost more."""
    arms = {name: arm for name, arm in comparison.arms.items() if arm.role == "arm"}
    reached = "" if ends.plain is None else f" Plain RL reaches {ends.mean(ends.plain)}."
    one_seed = len(comparison.seeds) == 1
    higher = [arm.difference is not None and arm.difference.mean > 0 for arm in arms.values()]
    better = higher if one_seed else [above(arm) for arm in arms.values()]
    ahead = [name for name, is_better in zip(arms, better, strict=True) if is_better]
    names = f": {listed(ahead)}" if ahead else ""
    if not arms:
        found = [f"All arms are plain RL or controls.{reached}"]
    elif one_seed:
        found = [
            f"{len(ahead)} of {counted(len(arms), 'arm')} {'ends' if len(ahead) == 1 else 'end'} above plain RL after "
            f"{comparison.steps} steps{names}.{reached} One seed gives no intervals, so small differences may be noise."
        ]
    else:
        found = [
            f"{len(ahead)} of {counted(len(arms), 'arm')} {'beats' if len(ahead) == 1 else 'beat'} plain RL after "
            f"{comparison.steps} steps with the whole 95% interval of the paired difference{names}.{reached}"
        ]
    if ends.best is not None:
        found.append(_best(comparison, ends, ends.best))
    beating = [name for name, arm in comparison.arms.items() if arm.role == "control" and above(arm)]
    if beating := [name for name in beating if name != ends.tuned]:
        found.append(f"Warning: {listed(beating)}, meant as a control, also beats plain RL.")
    return found


def _best(comparison: Comparison, ends: Ends, name: str) -> str:
    arm = comparison.arms[name]
    parts = [f"The best arm, {name}, reaches {ends.mean(name)}: {with_span(arm.difference)} against plain RL"]
    if arm.difference_longer is not None and comparison.longer is not None:
        parts.append(f"{with_span(arm.difference_longer)} against plain RL of {comparison.longer} steps")
    if ends.tuned is not None:
        difference = paired(ends.accuracy[name], ends.accuracy[ends.tuned])
        values = values_text(comparison.arms[ends.tuned].chosen)
        parts.append(f"{with_span(difference)} against plain RL tuned on the validation prompts ({values})")
    return f"{', '.join(parts)}."


def _tiles(comparison: Comparison, ends: Ends) -> list[tuple[str, str]]:
    """Return the accuracy before RL, of the plain runs, and of the best arm."""
    before = comparison.base.get("test", {}).get(comparison.metric)
    labels = {
        ends.plain: f"plain RL, {comparison.steps} steps",
        ends.longer: f"plain RL, {comparison.longer} steps",
        ends.tuned: "plain RL, tuned",
        ends.best: f"best arm: {ends.best}",
    }
    tiles = [] if before is None else [(decimal(before), "before RL")]
    return tiles + [(ends.mean(name), label) for name, label in labels.items() if name is not None]


def _refusals(name: str, jumps: Sequence[Jump]) -> list[dict[str, Any]]:
    """Return why an arm's jumps were refused, the most frequent reasons first."""
    found = reasons([jump for jump in jumps if not jump.accepted])
    rest = [jump for _, alike in found[MOST_REASONS:] for jump in alike]
    shown = [*found[:MOST_REASONS], *([("other reasons", rest)] if rest else [])]
    return [{"arm": name, "count": len(alike), "steps": steps_text(alike), "reason": reason} for reason, alike in shown]

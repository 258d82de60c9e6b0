"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    page = Page("compare.html", title, subtitle, _summary(comparison), _tiles(comparison), SECTIONS)
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
        "ends": {name: end for name, arm in arms.items() if (end := _end(arm, comparison)) is not None},
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


def _end(arm: Arm, comparison: Comparison) -> Interval | None:
    return arm.test.get(comparison.metric)


def _find(comparison: Comparison, role: str, steps: int | None = None) -> tuple[str, Arm] | None:
    """Return the plain run of so many steps, the tuned control, or the arm with the highest mean accuracy."""
    found = [(name, arm) for name, arm in comparison.arms.items() if arm.role == role and _end(arm, comparison)]
    if role == "plain":
        found = [(name, arm) for name, arm in found if arm.steps == steps]
    elif role == "control":
        found = [(name, arm) for name, arm in found if arm.chosen]
    else:
        found.sort(key=lambda one: -_mean_end(one[1], comparison))
    return found[0] if found else None


def _mean_end(arm: Arm, comparison: Comparison) -> float:
    end = _end(arm, comparison)
    return float("-inf") if end is None else end.mean


def _summary(comparison: Comparison) -> list[str]:
    """Say which arms beat plain RL, and how the best one compares with the controls that cost more."""
    arms = {name: arm for name, arm in comparison.arms.items() if arm.role == "arm"}
    plain, best, tuned = (_find(comparison, role, comparison.steps) for role in ("plain", "arm", "control"))
    reached = "" if plain is None else f" Plain RL reaches {decimal(_mean_end(plain[1], comparison))}."
    ahead = [name for name, arm in arms.items() if above(arm)]
    higher = [name for name, arm in arms.items() if arm.difference is not None and arm.difference.mean > 0]
    of = f"of {counted(len(arms), 'arm')}"
    if not arms:
        found = [f"All arms are plain RL or controls.{reached}"]
    elif len(comparison.seeds) == 1:
        names = f": {listed(higher)}" if higher else ""
        found = [
            f"{len(higher)} {of} {'ends' if len(higher) == 1 else 'end'} above plain RL after {comparison.steps} "
            f"steps{names}.{reached} One seed gives no intervals, so small differences may be noise."
        ]
    else:
        names = f": {listed(ahead)}" if ahead else ""
        found = [
            f"{len(ahead)} {of} {'beats' if len(ahead) == 1 else 'beat'} plain RL after {comparison.steps} steps with "
            f"the whole 95% interval of the paired difference{names}.{reached}"
        ]
    if best is not None:
        found.append(_best(comparison, *best, tuned))
    beating = [name for name, arm in comparison.arms.items() if arm.role == "control" and above(arm)]
    beating = [name for name in beating if tuned is None or name != tuned[0]]
    if beating:
        found.append(f"Warning: {listed(beating)}, meant as a control, also beats plain RL.")
    return found


def _best(comparison: Comparison, name: str, arm: Arm, tuned: tuple[str, Arm] | None) -> str:
    end = _end(arm, comparison)
    assert end is not None  # _find leaves out arms without one
    parts = [f"The best arm, {name}, reaches {decimal(end.mean)}: {with_span(arm.difference)} against plain RL"]
    if arm.difference_longer is not None and comparison.longer is not None:
        parts.append(f"{with_span(arm.difference_longer)} against plain RL of {comparison.longer} steps")
    against = None if tuned is None else _end(tuned[1], comparison)
    if tuned is not None and against is not None:
        values = values_text(tuned[1].chosen)
        parts.append(f"{with_span(paired(end, against))} against plain RL tuned on the validation prompts ({values})")
    return f"{', '.join(parts)}."


def _tiles(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the accuracy before RL, of the plain runs, and of the best arm."""
    before = comparison.base.get("test", {}).get(comparison.metric)
    tiles = [] if before is None else [(decimal(before), "before RL")]
    best = _find(comparison, "arm")
    for found, label in (
        (_find(comparison, "plain", comparison.steps), f"plain RL, {comparison.steps} steps"),
        (_find(comparison, "plain", comparison.longer), f"plain RL, {comparison.longer} steps"),
        (_find(comparison, "control"), "plain RL, tuned"),
        (best, "" if best is None else f"best arm: {best[0]}"),
    ):
        if found is not None:
            tiles.append((decimal(_mean_end(found[1], comparison)), label))
    return tiles


def _refusals(name: str, jumps: Sequence[Jump]) -> list[dict[str, Any]]:
    """Return why an arm's jumps were refused, the most frequent reasons first."""
    found = reasons([jump for jump in jumps if not jump.accepted])
    rest = [jump for _, alike in found[MOST_REASONS:] for jump in alike]
    shown = [*found[:MOST_REASONS], *([("other reasons", rest)] if rest else [])]
    return [{"arm": name, "count": len(alike), "steps": steps_text(alike), "reason": reason} for reason, alike in shown]

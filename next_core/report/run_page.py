"""The page of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from next_core.cycle.summary import done_text
from next_core.report import pictures
from next_core.report.formatting import decimal, mean, reasons, seconds, steps_text
from next_core.report.geometry import GeometryOptions, add_geometry
from next_core.report.inputs import Jump, Recorded, Result
from next_core.report.page import Page
from next_core.types import Progress

SECTIONS = {
    "accuracy": "Accuracy",
    "jumps": "Jumps and guards",
    "scaling": "Learning rate",
    "geometry": "How the weights move",
    "layers": "Which layers can be predicted",
    "time": "Time spent",
    "setup": "Setup",
}
PARTS = {
    "setup": "starting the trainer",
    "rl": "RL steps",
    "ours_observe": "next-core: reading checkpoints",
    "ours_predict": "next-core: predicting",
    "ours_extend": "next-core: changing weights",
    "ours_probe": "next-core: evaluating",
    "measuring": "measuring accuracy",
}
MOST_ROWS = 30
"""More jumps than these are shown in groups."""
GROUPS = 12
NAMES = ("start", "before_jump", "after_jump", "final")


def run_page(recorded: Recorded, title: str, options: GeometryOptions, progress: Progress | None = None) -> Page:
    """Return everything that a run's folder says."""
    page = Page("run.html", title, _subtitle(recorded), _summary(recorded), _tiles(recorded), SECTIONS)
    result = recorded.result
    _add_curves(page, recorded)
    if recorded.scaling:
        _add_scaling(page, recorded)
        left_out = {"jumps", "geometry", "layers"}
    else:
        _add_jumps(page, recorded)
        add_geometry(page, recorded, options, progress)
        left_out = {"scaling"} | ({"layers"} if "Geometry" in page.missing else set())
    page.sections = {id_: title for id_, title in SECTIONS.items() if id_ not in left_out}
    if result is None or not result.seconds:
        page.missing["Time"] = "it is recorded only when a run made from a config ends"
    if recorded.config is None:
        page.missing["Config"] = "the folder has no config.yaml, because a script made the run"
    schedule = recorded.started.get("schedule")
    page.facts |= {
        "recorded": recorded,
        "result": result,
        "control": recorded.control,
        "seed": recorded.seed,
        "steps": recorded.last_step if result is None else result.steps,
        "accuracies": [recorded.accuracy(name) for name in NAMES],
        "schedule": schedule if isinstance(schedule, dict) else {},
        "parts": [] if result is None else _parts(result),
    }
    return page


def _subtitle(recorded: Recorded) -> str:
    result = recorded.result
    if result is None:
        ended = any(record["event"] == "end" for record in recorded.events)
        state = "ended" if ended else f"last known step {recorded.last_step}"
        return f"Run without a result: {state}, predictor {recorded.predictor}"
    algorithm = str(result.settings.get("algorithm", "RL")).upper()
    return f"Run of {result.steps} {algorithm} steps, predictor {recorded.predictor}, seed {recorded.seed}"


def _summary(recorded: Recorded) -> list[str]:
    result, start, end = recorded.result, recorded.accuracy("start"), recorded.accuracy("final")
    plain = None if recorded.control is None else recorded.control.accuracy.get("final")
    if result is None:
        found = [
            "There is no result: the run is still going, was stopped, or was driven by the TRL callback. This page "
            f"shows what is known up to step {recorded.last_step}."
        ]
    elif start is None or end is None:
        found = [f"The run of {result.steps} RL steps has ended; no accuracy was measured."]
    else:
        against = ""
        if plain is not None:
            against = (
                f"; the plain run with the same seed ended at {decimal(plain)}, {decimal(abs(end - plain))} "
                f"{'below' if end >= plain else 'above'} it. One seed says little about small differences"
            )
        moved = f"test accuracy went from {decimal(start)} to {decimal(end)}"
        found = [f"In {result.steps} RL steps {moved}{against}.", *_greedy(result)]
    jumps, scaling = ([one.model_dump() for one in some] for some in (recorded.jumps, recorded.scaling))
    return [*found, done_text(jumps, scaling)]


def _greedy(result: Result) -> list[str]:
    """Return the change in greedy accuracy, where it was measured: it can differ from that of sampled answers."""
    if not result.curve or "sampled" not in result.curve[-1].test:
        return []
    start, end = (result.curve[place].test.get("greedy") for place in (0, -1))
    if start is None or end is None:
        return []
    curve = [] if result.control is None else result.control.curve
    plain = curve[-1].test.get("greedy") if curve else None
    against = "" if plain is None else f"; the plain run ended at {decimal(plain)}"
    return [f"This is with sampled answers. Greedy accuracy went from {decimal(start)} to {decimal(end)}{against}."]


def _tiles(recorded: Recorded) -> list[tuple[str, str]]:
    accuracies = {
        "test accuracy at the start": recorded.accuracy("start"),
        "at the end": recorded.accuracy("final"),
        "plain run, same seed": None if recorded.control is None else recorded.control.accuracy.get("final"),
    }
    tiles = [(decimal(value), label) for label, value in accuracies.items() if value is not None]
    rates = [one.rate for one in recorded.scaling if one.rate is not None]
    if rates:
        tiles.append((f"{max(rates):.2g}", "largest learning rate"))
    else:
        made = sum(jump.accepted for jump in recorded.jumps)
        tiles.append((f"{made} of {len(recorded.jumps)}", "attempted jumps made"))
    if recorded.result is not None and "total" in recorded.result.seconds:
        tiles.append((seconds(recorded.result.seconds["total"]), "in total"))
    return tiles


def _add_curves(page: Page, recorded: Recorded) -> None:
    if all(recorded.accuracy(name) is None for name in NAMES):
        page.missing["Accuracy on the test prompts"] = "none was measured"
    page.draw("accuracy-over-steps", 4.3, pictures.progress, recorded, "steps", what="Accuracy along the run")
    page.draw("accuracy-over-seconds", 4.3, pictures.progress, recorded, "seconds")
    rewards = [numbers["reward"] for numbers in recorded.metrics.values() if "reward" in numbers]
    if not page.drawings:
        page.draw("reward", 3.9, pictures.reward, recorded, what="Reward along the run")
    page.facts |= {"rewards": rewards}


def _add_scaling(page: Page, recorded: Recorded) -> None:
    """Add the learning rate over the run, the returns to earlier weights, and what was refused."""
    page.draw("learning-rate", 3.4, pictures.learning_rate, recorded.scaling)
    page.facts |= {
        "jumps": [],
        "returns": [one for one in recorded.scaling if one.back_to is not None],
        "refused": [one for one in recorded.scaling if not one.accepted],
    }


def _add_jumps(page: Page, recorded: Recorded) -> None:
    """Add every jump, or groups of neighbours, the outcomes with their reasons, and what the jumps did."""
    jumps = recorded.jumps
    if not jumps:
        page.missing["Jumps"] = "none was attempted"
    page.draw("jump-effects", 3.4, pictures.effects, jumps)
    page.draw("multiples", 3.4, pictures.multiples, {recorded.predictor: [jumps]})
    outcomes = {"made": [j for j in jumps if j.accepted], "refused": [j for j in jumps if not j.accepted]}
    page.facts |= {
        "jumps": jumps,
        "groups": [] if len(jumps) <= MOST_ROWS else _groups(jumps),
        "recovered": any(jump.accuracy_recovered is not None for jump in jumps),
        "outcomes": [
            (outcome, len(alike), steps_text(alike), reason)
            for outcome, some in outcomes.items()
            for reason, alike in reasons(some)
        ],
        "changes": [jump.change for jump in jumps if jump.change is not None],
        "highest_multiple": max((jump.multiple or 0.0 for jump in jumps), default=0.0),
    }


def _groups(jumps: Sequence[Jump]) -> list[dict[str, Any]]:
    """Return at most ``GROUPS`` rows of neighbouring jumps."""
    size = math.ceil(len(jumps) / GROUPS)
    rows = []
    for some in (jumps[first : first + size] for first in range(0, len(jumps), size)):
        made = [jump for jump in some if jump.accepted]
        rows.append(
            {
                "steps": steps_text(some),
                "attempted": len(some),
                "made": len(made),
                "norm": mean([jump.norm_ratio for jump in made]),
                "before": mean([jump.accuracy_before for jump in some]),
                "after": mean([jump.accuracy_after for jump in some]),
            }
        )
    return rows


def _parts(result: Result) -> list[tuple[str, float, float]]:
    """Return what took time, with its seconds and its share of the total."""
    parts = [(label, result.seconds[part]) for part, label in PARTS.items() if part in result.seconds]
    if result.control is not None and result.control.seconds is not None:
        parts.append(("the plain run", result.control.seconds))
    total = result.seconds.get("total", sum(value for _, value in parts))
    rest = total - sum(value for _, value in parts)
    if rest > 0.005 * total:
        parts.append(("everything else, such as starting the plain run", rest))
    return [(label, value, min(max(value / total, 0.0), 1.0) if total > 0 else 0.0) for label, value in parts]

"""The page of a run, and that of several runs side by side."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from next_core.cycle.journal_advice import rate_found
from next_core.cycle.summary import advice_texts, done_text, ends, measured, outcome, summary
from next_core.diagnostics.learning_rate import LearningRate, learning_rate_advice
from next_core.report import charts
from next_core.report.formatting import NONE, decimal, merged, reasons, seconds, steps_text, whole
from next_core.report.geometry import GeometryOptions, add_geometry
from next_core.report.inputs import Jump, Recorded, Result
from next_core.report.page import Advice, Code, Facts, Page, Table, Text
from next_core.types import Progress

PARTS = {
    "setup": "starting the trainer",
    "rl": "RL steps",
    "ours_observe": "next-core: reading checkpoints",
    "ours_predict": "next-core: predicting",
    "ours_extend": "next-core: changing weights",
    "ours_probe": "next-core: evaluating",
    "measuring": "measuring accuracy",
}
RATE = re.compile(r"learning_rate (?:from \S+ )?(?:to about )?(\d[\d.]*(?:e-?\d+)?)")  # The rate that an advice names
KEPT = "Keep the learning rate."


def run_page(recorded: Recorded, options: GeometryOptions, progress: Progress | None = None) -> Page:
    """Return everything that a run's folder says."""
    page = Page(recorded.title, _about(recorded), _summary(recorded))
    caption = "Reward: mean of the rollouts." + (" Ticks: jumps made; crosses: refused." if recorded.jumps else "")
    curve = charts.learning_curve(recorded)
    page.curve = page.figure("Learning curve", curve, caption, f"Learning curve. {page.summary[0]}", whole=True)
    page.advice = advice_of(recorded)
    if recorded.scaling:
        page.sections["Returns and refusals"] = _scaling(recorded)
    elif recorded.jumps:
        page.sections["Jumps"] = _jumps(recorded.jumps)
    if not recorded.scaling:
        rate = add_geometry(page, recorded, options, progress)
        page.advice = page.advice or (None if rate is None else _judged(rate))
    page.sections["Time"] = _time(page, recorded)
    page.sections["Setup"] = _setup(page, recorded)
    return page


def runs_page(runs: Mapping[str, Recorded]) -> Page:
    """Return several runs side by side: their curves over each other, what differs, and what is the same."""
    facts = {name: dict(_about(run)) | _figures(run) for name, run in runs.items()}
    rows = {what: [facts[name].get(what, "–") for name in runs] for one in facts.values() for what in one}
    differ = [[what, *values] for what, values in rows.items() if len(set(values)) > 1]
    same = [(what, values[0]) for what, values in rows.items() if len(set(values)) == 1]
    title = f"{len(runs)} runs: {', '.join(dict.fromkeys(run.title for run in runs.values()))}"
    page = Page(title, same, [_ranking(runs), *(f"{name}: {_summary(run)[0]}" for name, run in runs.items())])
    caption = "One colour for each run. Ticks: jumps made; crosses: refused."
    page.curve = page.figure("Learning curves", charts.curves_of(runs), caption, whole=True)
    page.sections["What differs"] = [Table("Runs side by side", ["", *runs], differ)] if differ else []
    advice = [[name, found.action, found.why] for name, run in runs.items() if (found := advice_of(run)) is not None]
    page.sections["Advice"] = [Table("What each run advises", ["run", "do", "why"], advice)] if advice else []
    page.sections["Configs"] = [Code(f"config.yaml of {name}", run.config) for name, run in runs.items() if run.config]
    return page


def _ranking(runs: Mapping[str, Recorded]) -> str:
    """Return how the runs ended, the best first, by what all of them measured."""
    known = {name: measured(run.events, run.metrics) for name, run in runs.items()}
    for what in next(iter(known.values())):
        if all(len(by[what]) > 1 for by in known.values()):
            last = sorted(((ends(by[what], what)[1], name) for name, by in known.items()), reverse=True)
            return f"{what} at the end: {', '.join(f'{name} {decimal(value)}' for value, name in last)}."
    return "The runs share no measure."


def advice_of(recorded: Recorded) -> Advice | None:
    """Return the advice in a run's journal; that of a run with step scaling without any is to keep the rate."""
    texts = advice_texts(recorded.events)
    if texts:
        return _parsed(texts[-1])
    scales = [record for record in recorded.events if record["event"] == "scale"]
    if scales and rate_found(scales) is None:
        return Advice(KEPT, "Step scaling found none that is better by more than half.")
    return None


def _parsed(text: str) -> Advice:
    """Take an advice apart: what to do, why, and the setting that it names."""
    action, _, why = text.partition(". ")
    found = RATE.search(action)
    rate = "" if found is None else found[1]
    setting = rate and f"training: {{learning_rate: {rate}}}   # or GRPOConfig(learning_rate={rate})"
    return Advice(f"{action.rstrip('.')}.", why, setting)


def _judged(rate: LearningRate) -> Advice | None:
    """Return what checkpoints say about the learning rate, if they say anything."""
    if text := learning_rate_advice(rate):
        return _parsed(text)
    if rate.factor is None or rate.agreement is None:
        return None
    why = f"It looks about right: consecutive {rate.span}-step updates have agreement {decimal(rate.agreement)}."
    return Advice(KEPT, why)


def _about(recorded: Recorded) -> list[tuple[str, str]]:
    about, scaled = recorded.about, [one.rate for one in recorded.scaling if one.rate]
    known = about.get("learning_rate")
    rate = f"{known:g}" if isinstance(known, int | float) else str(known or "")
    found = {
        "date": about.get("date"),
        "algorithm": str(about.get("algorithm") or "").upper(),
        "learning rate": rate + (f", scaled to {min(scaled):.2g} to {max(scaled):.2g}" if scaled else ""),
        "predictor": recorded.predictor,
        "seed": about.get("seed"),
        "rollouts a step": recorded.rollouts,
        "hardware": about.get("hardware"),
    }
    return [(name, str(value)) for name, value in found.items() if value not in (None, "")]


def _summary(recorded: Recorded) -> list[str]:
    """Return the outcome in one sentence, what was done, and what it meant beside sampled answers."""
    control, steps = recorded.control, recorded.started.get("steps") or 0
    plain = None if control is None else control.accuracy.get("final")
    found = [outcome(recorded.events, recorded.metrics, steps, recorded.last_step, plain), *_greedy(recorded.result)]
    lines = summary(recorded.events, recorded.metrics)
    known = tuple(measured(recorded.events, recorded.metrics))
    return found + [line for line in lines if not line.startswith((*known, "Hint:", "Refused"))]


def _greedy(result: Result | None) -> list[str]:
    """Return the change in greedy accuracy, where it was measured: it can differ from that of sampled answers."""
    if result is None or not result.curve or "sampled" not in result.curve[-1].test:
        return []
    start, end = (result.curve[place].test.get("greedy") for place in (0, -1))
    if start is None or end is None:
        return []
    curve = [] if result.control is None else result.control.curve
    plain = curve[-1].test.get("greedy") if curve else None
    against = "" if plain is None else f"; the plain run ended at {decimal(plain)}"
    return [f"These are sampled answers. Greedy accuracy went from {decimal(start)} to {decimal(end)}{against}."]


def _figures(recorded: Recorded) -> dict[str, str]:
    found = {"RL steps": whole(recorded.last_step)}
    for what, by in measured(recorded.events, recorded.metrics).items():
        if len(by) > 1:
            start, end = ends(by, what)
            found |= {f"{what} at the start": decimal(start), f"{what} at the end": decimal(end)}
    jumps, scaling = ([one.model_dump() for one in some] for some in (recorded.jumps, recorded.scaling))
    found["what was done"] = done_text(jumps, scaling)
    if recorded.result is not None and "total" in recorded.result.seconds:
        found["time"] = seconds(recorded.result.seconds["total"])
    return found


def _scaling(recorded: Recorded) -> list[Table]:
    """Return the returns to earlier weights, and what was refused."""
    back = []
    for one in (one for one in recorded.scaling if one.back_to is not None):
        fell = f"the reward fell to {decimal(one.reward)} from {decimal(one.best)}"
        why = "the first steps cancelled each other" if one.reward is None else fell
        back.append([whole(one.step), whole(one.back_to), why])
    refused = [[whole(one.step), one.reason] for one in recorded.scaling if not one.accepted]
    tables = [Table("Returns to earlier weights", ["after step", "back to step", "why"], back)] if back else []
    return tables + ([Table("Learning rate not changed", ["step", "why"], merged(refused))] if refused else [])


def _jumps(jumps: Sequence[Jump]) -> list[Table]:
    """Return every jump, equal neighbours in one row, and the reasons of those refused."""
    rows = []
    for jump in jumps:
        size = [NONE if jump.alpha is None else f"{jump.alpha:g}", decimal(jump.norm_ratio, 2)]
        accuracy = [decimal(one) for one in (jump.accuracy_before, jump.accuracy_after, jump.accuracy_recovered)]
        outcome = "made" if jump.accepted else "refused"
        rows.append([whole(jump.step), jump.predictor or NONE, *size, *accuracy, outcome])
    names = ["step", "predictor", "alpha", "norm", "before", "after", "recovered", "outcome"]
    note = "Norm: relative to the update just before. Before, after: accuracy on the validation prompts."
    alike = reasons([jump for jump in jumps if not jump.accepted])
    refused = [[steps_text(some), str(len(some)), why] for why, some in alike]
    known = [place for place, column in enumerate(zip(*rows, strict=True)) if set(column) != {NONE}]
    names, *rows = ([row[place] for place in known] for row in (names, *rows))
    tables = [Table("Every attempted jump", names, merged(rows), note)]
    return tables + ([Table("Why jumps were refused", ["steps", "times", "reason"], refused)] if refused else [])


def _time(page: Page, recorded: Recorded) -> list[Any]:
    result = recorded.result
    caption = "Test accuracy over the seconds of training, without evaluation."
    found: list[Any] = page.figure("Accuracy over seconds", charts.over_seconds(recorded), caption)
    if result is None or not result.seconds:
        page.missing["Time"] = "it is recorded when a run made from a config ends"
        return found
    parts = [(label, max(result.seconds[part], 0.0)) for part, label in PARTS.items() if part in result.seconds]
    if result.control is not None and result.control.seconds is not None:
        parts.append(("the plain run", result.control.seconds))
    spent = sum(value for _, value in parts)
    total = max(result.seconds.get("total", spent), spent)
    if total - spent > 0.005 * total:
        parts.append(("everything else, such as starting the plain run", total - spent))
    rows = [[name, seconds(value), f"{100 * value / (total or 1):.1f}%"] for name, value in parts]
    rows.append(["total", seconds(total), ""])
    return [*found, Table("Wall-clock time of the run", ["part", "time", "share"], rows)]


def _setup(page: Page, recorded: Recorded) -> list[Any]:
    result, schedule, about = recorded.result, recorded.started.get("schedule"), recorded.about
    facts: list[tuple[str, Any]] = [("model", about["model"])] if about.get("model") else []
    facts += [("task", about["task"])] if isinstance(about.get("task"), str) else []
    if result is not None and result.resumed_from is not None:
        facts.append(("resumed from step", result.resumed_from))
    facts += sorted(about["versions"].items()) if isinstance(about.get("versions"), dict) else []
    blocks: list[Any] = [Facts(facts)] if facts else []
    if isinstance(schedule, dict):
        blocks.append(Facts([(name, value) for name, value in schedule.items() if value is not None]))
    blocks += [Text([f"Note: {note}."]) for note in (result.notes if result is not None else [])]
    if recorded.config is None:
        page.missing["Config"] = "the folder has no config.yaml, because a script made the run"
        return blocks
    return [*blocks, Code("config.yaml with every default", recorded.config)]

"""The page of a comparison."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple, Self

import yaml

from next_core.comparison.comparison_results import Bounds, Interval
from next_core.report import charts
from next_core.report import formatting as form
from next_core.report.formatting import NONE, Format, counted, decimal, seconds, signed, whole
from next_core.report.inputs import Comparison, Jump, title_of
from next_core.report.page import Block, Cell, Code, Facts, Page, Table, Text

KINDS = ("sampled", "greedy")  # Kinds of accuracy, in the order of the table
MOST_REASONS = 3  # Reasons for refused jumps that an arm lists; the rest are counted together


def compare_page(comparison: Comparison, title: str) -> Page:
    """Return everything that ``compare.json`` says."""
    ends = Ends.of(comparison)
    page = Page(title_of(comparison.about) or title, _about(comparison), _summary(comparison, ends))
    bands = {1: "", 2: " Two seeds: a line each."}.get(len(comparison.seeds), " Bands: 95% intervals.")
    means = "; ".join(f"{name} {decimal(end.mean)}" for name, end in ends.accuracy.items())
    page.curve = page.figure(
        "Accuracy over RL steps",
        charts.compared(comparison, "steps"),
        f"Accuracy ({comparison.metric}) on the test prompts.{bands} Ticks: jumps made in any seed; crosses: refused.",
        f"Curves of test accuracy over RL steps. At the end: {means}",
        whole=True,
    )
    page.sections["Accuracy"] = _accuracy(page, comparison)
    page.sections["Savings and costs"] = _cost(page, comparison)
    page.sections["Choices on the validation prompts"] = _choices(page, comparison)
    page.sections["Jumps"] = _jumps(page, comparison)
    page.sections["Setup"] = _setup(page, comparison)
    return page


def _about(comparison: Comparison) -> list[tuple[str, str]]:
    about = comparison.about
    found = {
        "date": about.get("date"),
        "algorithm": str(about.get("algorithm") or "").upper(),
        "learning rate": about.get("learning_rate"),
        "RL steps": comparison.steps,
        "seeds": len(comparison.seeds),
        "rollouts a step": comparison.rollouts_per_step,
        "hardware": comparison.hardware,
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _accuracy(page: Page, comparison: Comparison) -> list[Block]:
    arms, longer, base = comparison.arms, comparison.longer, comparison.base.get("test", {})
    measured = {kind for arm in arms.values() for kind in arm.test}
    kinds = list(dict.fromkeys(kind for kind in [*KINDS, *sorted(measured)] if kind in measured))
    against = [f"against plain, {steps} steps" for steps in (comparison.steps, longer) if steps is not None]
    rows: list[list[str | Cell]] = []
    if base:
        rows.append(["before RL", "0", *(decimal(base.get(kind)) for kind in kinds), *(NONE for _ in against)])
    for name, arm in arms.items():
        differences = [_cell(arm.difference, signed, above(arm.difference)), _cell(arm.difference_longer, signed)]
        tests = [_cell(arm.test.get(kind)) for kind in kinds]
        rows.append([name, whole(arm.steps), *tests, *differences[: len(against)]])
    seeds = len(comparison.seeds)
    small = f"Small: 95% intervals, Student's t over {seeds} seeds. Bold: the whole interval is above plain RL."
    small = small if seeds > 1 else "One seed: no intervals."
    caption = f"Accuracy on the test prompts, mean over {counted(seeds, 'seed')}"
    note = f"Differences are of {comparison.metric} accuracy, paired by seed. {small}"
    shown = {n: arm for n, arm in arms.items() if arm.difference is not None and arm.role != "plain"}
    values = "; ".join(f"{name}: {form.with_span(arm.difference)}" for name, arm in shown.items())
    words = f"Differences to plain RL, paired by seed.{' Bars: 95% intervals; ticks: seeds.' if seeds > 1 else ''}"
    figure = page.figure("Differences to plain RL", charts.differences(comparison), words, f"Forest plot. {values}")
    return [Table(caption, ["arm", "RL steps", *kinds, *against], rows, note, main=True), *figure]


def _cost(page: Page, comparison: Comparison) -> list[Block]:
    rows: list[list[str | Cell]] = []
    for name, arm in comparison.arms.items():
        bound = "≥ " if arm.beyond else ""
        steps = _cell(arm.equals_step, whole, prefix=bound), _cell(arm.steps_saved, form.signed_whole, prefix=bound)
        time = (
            _cell(arm.seconds, seconds),
            form.less_or_more(arm.seconds_saved, arm.beyond > 0),
            _cell(arm.ours_seconds, seconds),
        )
        rows.append([name, whole(arm.spent_steps), *steps, *time, _cell(arm.icer, form.one_digit)])
    names = ["arm", "RL steps spent", "equals plain step", "steps saved", "time", "than plain", "overhead", "ICER"]
    notes = [
        "RL steps spent: per seed, including the settings that were not chosen.",
        f"Equals plain step: the step at which plain RL has the same {comparison.metric} accuracy. Steps saved: that "
        "step minus the arm's own. Than plain: the arm's time against that of plain RL up to that step.",
        "Overhead: seconds spent predicting, changing weights and evaluating.",
        "ICER: RL steps per percentage point of accuracy gained over the base model; lower is cheaper.",
    ]
    if beyond := {name: arm.beyond for name, arm in comparison.arms.items() if arm.beyond}:
        each = ", ".join(f"{name}: {count}" for name, count in beyond.items())
        some = f"some of {counted(len(comparison.seeds), 'seed')} ({each})"
        notes.append(f"≥: better than the whole plain curve in {some}; there the curve's end is used.")
    words = "Accuracy over seconds of training, evaluation excluded."
    figure = page.figure("Accuracy over seconds of training", charts.compared(comparison, "seconds"), words)
    return [Table("Steps and time, mean over seeds", names, rows), *figure, Text(notes, "aside")]


def _choices(page: Page, comparison: Comparison) -> list[Block]:
    rows: list[list[str | Cell]] = []
    for name, arm in comparison.arms.items():
        for one in arm.variants if len(arm.variants) > 1 else ():
            accuracies = _cell(one.validation, strong=one.chosen), _cell(one.test)
            rows.append([name, form.values_text(one.values), *accuracies, "chosen" if one.chosen else ""])
    caption = f"Settings tried, {comparison.metric} accuracy; the choice does not use the test prompts"
    return [Table(caption, ["arm", "setting", "validation", "test", "choice"], rows)] if rows else []


def _jumps(page: Page, comparison: Comparison) -> list[Block]:
    rows: list[list[str | Cell]] = []
    refusals: list[list[str]] = []
    for name, arm in comparison.arms.items():
        if arm.tries:
            made = [jump for jump in arm.jump_log if jump.accepted]
            counts = [whole(len(arm.jump_log)), whole(len(made)), whole(len(arm.jump_log) - len(made))]
            first = Cell(name, "" if arm.predictor == name else arm.predictor)
            norms = [jump.norm_ratio for jump in made if jump.norm_ratio is not None]
            rows.append([first, *counts, form.steps_text(made), decimal(fmean(norms) if norms else None, 2)])
            refusals += _refusals(name, arm.jump_log)
    if not rows:
        page.missing["Jumps"] = "no arm attempted one"
        return []
    names = ["arm", "attempted", "made", "refused", "made at steps", "mean norm"]
    note = "Norm: of the jump, relative to the update just before."
    blocks: list[Block] = [Table("Jumps of all seeds", names, rows, note)]
    multiples = charts.arm_multiples(comparison.arms)
    if not isinstance(multiples, str):
        caption = "Multiple of the observed update that a jump aims at; 1 is no jump."
        blocks += page.figure("Multiples", multiples, caption)
    if not refusals:
        return [*blocks, Text(["No jump was refused."])]
    return [*blocks, Table("Why jumps were refused", ["arm", "times", "at steps", "reason"], refusals)]


def _setup(page: Page, comparison: Comparison) -> list[Block]:
    facts: list[tuple[str, Any]] = [("seeds", ", ".join(map(str, comparison.seeds)))]
    steps = {"RL steps run, all seeds": comparison.steps_run, "RL steps saved by sharing": comparison.steps_shared}
    facts += [(name, whole(count)) for name, count in steps.items() if count is not None]
    facts += sorted(comparison.versions.items())
    if not comparison.config:
        page.missing["Config"] = "compare.json holds none"
        return [Facts(facts)]
    config = yaml.safe_dump(comparison.config, sort_keys=False, allow_unicode=True, width=100)
    return [Facts(facts), Code("The comparison's config with every default", config)]


def _cell(value: Bounds | None, shape: Format = decimal, strong: bool = False, prefix: str = "") -> Cell:
    return Cell(NONE) if value is None else Cell(prefix + shape(value.mean), form.span(value, shape), strong)


def above(difference: Interval | None) -> bool:
    """Return whether a difference is above 0 with its whole interval."""
    return difference is not None and difference.low is not None and difference.low > 0


def paired(one: Interval, other: Interval) -> Interval | None:
    """Return the mean of one minus other over the seeds that both have, with Student's 95% interval."""
    pairs = {seed: (mine, other.values.get(seed)) for seed, mine in one.values.items()}
    each = {seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None}
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
        return decimal(self.accuracy[name].mean)


def _summary(comparison: Comparison, ends: Ends) -> list[str]:
    """Say which arms beat plain RL and which the controls, and how the best one compares with those."""
    arms = {name: arm for name, arm in comparison.arms.items() if arm.role == "arm"}
    single = len(comparison.seeds) == 1

    def better(difference: Interval | None) -> bool:
        return above(difference) or (single and difference is not None and difference.mean > 0)

    reached = "." if ends.plain is None else f" plain RL reaches {ends.mean(ends.plain)}."
    if not arms:
        return [f"All arms are plain RL or controls: after {comparison.steps} steps{reached}"]
    ahead = [name for name, arm in arms.items() if better(arm.difference)]
    names = f" ({form.listed(ahead)})" if ahead else ""
    first = f"{len(ahead)} of {counted(len(arms), 'arm')} {'beats' if len(ahead) == 1 else 'beat'} plain RL{names}"
    controls = {name: arm for name, arm in comparison.arms.items() if arm.role == "control" and name in ends.accuracy}
    by_control: dict[str, list[str]] = {}
    for control in controls:
        wins = [n for n in arms if n in ends.accuracy and better(paired(ends.accuracy[n], ends.accuracy[control]))]
        by_control.setdefault(form.listed(wins) if wins else "none", []).append(control)
    parts = [f"{who} {'beat' if ' and ' in who else 'beats'} {form.listed(some)}" for who, some in by_control.items()]
    sure = "An arm beats another where the whole 95% interval of their paired difference is above 0."
    sure = "One seed: small differences may be noise." if single else sure
    found = [f"{'; '.join([first, *parts])}.", f"After {comparison.steps} steps{reached} {sure}"]
    if ends.best is not None:
        found.append(_best(comparison, ends, ends.best))
    beating = [name for name, arm in controls.items() if above(arm.difference) and name != ends.tuned]
    if beating:
        found.append(f"Warning: {form.listed(beating)}, meant as a control, also beats plain RL.")
    return found


def _best(comparison: Comparison, ends: Ends, name: str) -> str:
    arm = comparison.arms[name]
    parts = [f"The best arm, {name}, reaches {ends.mean(name)}: {form.with_span(arm.difference)} against plain RL"]
    if arm.difference_longer is not None and comparison.longer is not None:
        parts.append(f"{form.with_span(arm.difference_longer)} against plain RL of {comparison.longer} steps")
    if ends.tuned is not None:
        difference = paired(ends.accuracy[name], ends.accuracy[ends.tuned])
        values = form.values_text(comparison.arms[ends.tuned].chosen)
        parts.append(f"{form.with_span(difference)} against plain RL tuned on the validation prompts ({values})")
    return f"{', '.join(parts)}."


def _refusals(name: str, jumps: Sequence[Jump]) -> list[list[str]]:
    """Return why an arm's jumps were refused, the most frequent reasons first."""
    found = form.reasons([jump for jump in jumps if not jump.accepted])
    rest = [jump for _, alike in found[MOST_REASONS:] for jump in alike]
    shown = [*found[:MOST_REASONS], *([("other reasons", rest)] if rest else [])]
    return [[name, str(len(alike)), form.steps_text(alike), reason] for reason, alike in shown]

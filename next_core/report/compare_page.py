"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from next_core.diagnostics.drawing import Drawing
from next_core.report.compare_pictures import Over, draw_curves, draw_differences, draw_multiples
from next_core.report.compare_summary import above, summary, tiles, value, with_span
from next_core.report.inputs import Comparison, Interval, Jump
from next_core.report.page import (
    Block,
    Bullets,
    Cell,
    Code,
    Columns,
    Facts,
    Missing,
    Page,
    Picture,
    Section,
    Single,
    Table,
    Text,
)
from next_core.report.words import (
    NOTHING,
    as_yaml,
    counted,
    figure,
    listed,
    mean,
    reasons,
    seconds,
    settings,
    signed,
    span,
    steps_of,
    whole,
)

WAYS = ("sampled", "greedy")
MOST_REASONS = 3


def compare_page(comparison: Comparison, title: str) -> Page:
    """Everything that ``compare.json`` says, for a colleague to read."""
    rollouts = comparison.rollouts_per_step
    budget = f", {rollouts} roll-outs a step" if rollouts else ""
    seeds = counted(len(comparison.seeds), "seed")
    return Page(
        title=title,
        subtitle=f"Comparison of {counted(len(comparison.arms), 'arm')}, {comparison.steps} RL steps{budget}, {seeds}",
        summary=summary(comparison),
        tiles=tiles(comparison),
        sections=[
            Section("accuracy", "Accuracy", _accuracy(comparison)),
            Section("cost", "What it saves and what it costs", _cost(comparison)),
            Section("chosen", "What was chosen on the validation prompts", _chosen(comparison)),
            Section("jumps", "Jumps", _jumps(comparison)),
            Section("setup", "Setup", _setup(comparison)),
        ],
    )


def _ways(comparison: Comparison) -> list[str]:
    """The ways of answering that any arm has, the usual ones first."""
    found = {way for arm in comparison.arms.values() for way in arm.test}
    return [*(way for way in WAYS if way in found), *sorted(found - set(WAYS))]


def _cell(interval: Interval | None, form: object = figure, strong: bool = False) -> Cell:
    assert callable(form)
    if interval is None:
        return Cell(NOTHING)
    return Cell(form(interval.mean), span(interval, form), strong=strong)


def _accuracy(comparison: Comparison) -> list[Block]:
    ways = _ways(comparison)
    to_plain, to_longer = f"against plain, {comparison.steps} steps", f"against plain, {comparison.longer} steps"
    headings = ["arm", "RL steps", *ways, to_plain]
    headings += [to_longer] if comparison.longer is not None else []
    rows: list[list[Cell | str]] = []
    base = comparison.base.get("test", {})
    if base:
        rows.append(
            ["before RL", "0", *(figure(base.get(way)) for way in ways), *[NOTHING] * (len(headings) - 2 - len(ways))]
        )
    for name, arm in comparison.arms.items():
        row: list[Cell | str] = [name, whole(arm.steps), *(_cell(arm.test.get(way)) for way in ways)]
        row.append(_cell(arm.difference, signed, above(arm)))
        row += [_cell(arm.difference_longer, signed)] if comparison.longer is not None else []
        rows.append(row)
    seeds = len(comparison.seeds)
    notes = [f"Differences are of {comparison.metric} accuracy, paired by seed."]
    if seeds > 1:
        notes.append(f"Small: 95% intervals, Student's t over {seeds} seeds. Bold: wholly above plain RL.")
    else:
        notes.append("One seed: no intervals.")
    caption = f"Accuracy on the test prompts, mean over {counted(seeds, 'seed')}"
    table = Table(caption, headings, rows, words=["arm"], notes=notes)
    return [table, Columns([_forest(comparison), _curves(comparison, "steps")])]


def _forest(comparison: Comparison) -> Single:
    forest = draw_differences(comparison)
    if isinstance(forest, str):
        return Missing("Differences to plain RL", forest)
    shown = [(name, arm) for name, arm in comparison.arms.items() if arm.difference is not None and arm.role != "plain"]
    words = "; ".join(f"{name}: {with_span(arm.difference)}" for name, arm in shown)
    how = "Bars: 95% intervals; small ticks: seeds." if len(comparison.seeds) > 1 else "One seed."
    caption = f"Differences to plain RL on the test prompts, paired by seed. {how} Right of zero is better than plain."
    return Picture(forest, caption, f"Forest plot of differences to plain RL. {words}")


def _curves(comparison: Comparison, over: Over) -> Single:
    what = "RL steps" if over == "steps" else "seconds of training (measuring left out)"
    drawn = draw_curves(comparison, over)
    if isinstance(drawn, str):
        return Missing(f"Accuracy over {what}", drawn)
    band = ", with 95% bands" if len(comparison.seeds) > 1 else ""
    jumping = over == "steps" and any(arm.jump_log for arm in comparison.arms.values())
    ticks = " Ticks below: jumps that were made, in any seed; crosses: refused in all." if jumping else ""
    known = ((name, value(arm, comparison)) for name, arm in comparison.arms.items())
    ends = "; ".join(f"{name} {figure(end.mean)}" for name, end in known if end is not None)
    return Picture(
        drawn,
        f"Accuracy ({comparison.metric}) on the test prompts over {what}{band}.{ticks}",
        f"Curves of test accuracy over {what}. At the end: {ends}",
    )


def _cost(comparison: Comparison) -> list[Block]:
    headings = [
        "arm",
        "RL steps spent",
        "equals plain step",
        "steps saved",
        "seconds",
        "seconds saved",
        "of it ours",
        "ICER",
    ]
    rows: list[list[Cell | str]] = []
    for name, arm in comparison.arms.items():
        bound = "≥ " if arm.beyond else ""
        equals = Cell(NOTHING) if arm.equals_step is None else _cell(arm.equals_step, whole)
        saved = Cell(NOTHING) if arm.steps_saved is None else _cell(arm.steps_saved, _signed_whole)
        rows.append(
            [
                name,
                NOTHING if arm.spent_steps is None else whole(arm.spent_steps),
                Cell(bound + equals.text, equals.small),
                Cell(bound + saved.text if saved.text != NOTHING else NOTHING, saved.small),
                _cell(arm.seconds, seconds),
                _cell(arm.seconds_saved, seconds),
                _cell(arm.ours_seconds, seconds),
                _cell(arm.icer, _one_digit),
            ]
        )
    beyond = {name: arm.beyond for name, arm in comparison.arms.items() if arm.beyond}
    meaning = [
        "RL steps spent: of one seed, those of settings that were not chosen included.",
        f"Equals plain step: the step of plain RL with the same {comparison.metric} accuracy. Steps saved: that minus "
        "the arm's own steps.",
        "Of it ours: the part of the seconds that predicting, jumping and probing took.",
        "ICER: RL steps for each percentage point of accuracy gained over the base model; less is cheaper.",
    ]
    beyond = {name: arm.beyond for name, arm in comparison.arms.items() if arm.beyond}
    if beyond:
        each = ", ".join(f"{name}: {count}" for name, count in beyond.items())
        meaning.append(
            f"≥: better than the whole plain curve in some of {counted(len(comparison.seeds), 'seed')} ({each}), whose "
            "end stands for them."
        )
    table = Table("Steps and seconds, mean over seeds", headings, rows, words=["arm"])
    return [table, Columns([_curves(comparison, "seconds"), Bullets(meaning)])]


def _signed_whole(value: float) -> str:
    return signed(value, 0)


def _one_digit(value: float) -> str:
    return figure(value, 1)


def _chosen(comparison: Comparison) -> list[Block]:
    rows: list[list[Cell | str]] = []
    for name, arm in comparison.arms.items():
        if len(arm.variants) < 2:
            continue
        rows += [
            [
                name,
                settings(variant.values),
                _cell(variant.validation, strong=variant.chosen),
                _cell(variant.test),
                "chosen" if variant.chosen else "",
            ]
            for variant in arm.variants
        ]
    if not rows:
        return [Missing("Choices", "every arm ran with one setting, so that nothing was chosen")]
    headings = ["arm", "setting", "validation", "test", "choice"]
    caption = f"Settings tried, {comparison.metric} accuracy; the test prompts had no say"
    return [Table(caption, headings, rows, words=["arm", "setting", "choice"])]


def _jumps(comparison: Comparison) -> list[Block]:
    rows: list[list[Cell | str]] = []
    refusals: list[list[Cell | str]] = []
    for name, arm in comparison.arms.items():
        tried = arm.jump_log
        if not tried:
            continue
        made = [jump for jump in tried if jump.accepted]
        rows.append(
            [
                Cell(name, "" if arm.predictor == name else arm.predictor),
                whole(len(tried)),
                whole(len(made)),
                whole(len(tried) - len(made)),
                steps_of(made).removeprefix("steps ").removeprefix("step ") if made else NOTHING,
                figure(mean([jump.norm_ratio for jump in made]), 2),
            ]
        )
        refusals += _refusals(name, [jump for jump in tried if not jump.accepted])
    if not rows:
        return [Missing("Jumps", "no arm tried one")]
    headings = ["arm", "tried", "made", "refused", "made at steps", "mean norm"]
    note = "Norm: of a jump, over that of the motion just before."
    blocks: list[Single] = [Table("Jumps of all seeds", headings, rows, words=["arm"], notes=[note])]
    runs = {name: list(arm.jumps.values()) for name, arm in comparison.arms.items() if _has_multiples(arm.jump_log)}
    if runs:
        drawn = draw_multiples(runs)
        if isinstance(drawn, Drawing):
            caption = "Multiple of the observed motion that a jump aims at; a line for each seed. 1 is no jump."
            most = max(
                jump.diagnostics.get("multiple") or 0 for arm in comparison.arms.values() for jump in arm.jump_log
            )
            told = f"Multiples over RL steps of {listed(list(runs))}, at most {figure(most, 1)}"
            blocks.append(Picture(drawn, caption, told))
    if not refusals:
        return [Columns(blocks), Text("No jump was refused.")]
    words = ["arm", "when", "reason"]
    return [Columns(blocks), Table("Why jumps were refused", ["arm", "times", "when", "reason"], refusals, words)]


def _has_multiples(jumps: Sequence[Jump]) -> bool:
    return any(jump.diagnostics.get("multiple") is not None for jump in jumps)


def _refusals(name: str, refused: Sequence[Jump]) -> list[list[Cell | str]]:
    found = reasons(refused)
    rows: list[list[Cell | str]] = [
        [name, whole(len(alike)), steps_of(alike), reason] for reason, alike in found[:MOST_REASONS]
    ]
    rest = [jump for _, alike in found[MOST_REASONS:] for jump in alike]
    if rest:
        rows.append([name, whole(len(rest)), steps_of(rest), "other reasons"])
    return rows


def _setup(comparison: Comparison) -> list[Block]:
    ran = (("RL steps run, all seeds", comparison.steps_run), ("RL steps saved by sharing", comparison.steps_shared))
    facts = [
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("hardware", comparison.hardware or "not recorded"),
        *((words, whole(steps)) for words, steps in ran if steps is not None),
        *sorted(comparison.versions.items()),
    ]
    blocks: list[Block] = [Facts(facts)]
    if comparison.config:
        blocks.append(Code(as_yaml(comparison.config), "The comparison's config, every setting resolved"))
    else:
        blocks.append(Missing("Config", "compare.json holds none"))
    return blocks

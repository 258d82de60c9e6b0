"""The geometry of a run's weights, for its page; what cannot be measured is missing with a reason."""

from dataclasses import dataclass
from pathlib import Path

from next_core.checkpoints import open_checkpoints
from next_core.diagnostics import FIGURES, Analysis, analyze, with_origin
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.learning_rate import LearningRate, learning_rate_advice
from next_core.errors import CheckpointError, ConfigError, NextCoreError
from next_core.history.delta_cache import DeltaCache
from next_core.history.history import History
from next_core.interfaces import CheckpointSource
from next_core.report import charts
from next_core.report.formatting import NONE, counted, decimal, signed
from next_core.report.inputs import Recorded
from next_core.report.page import Block, Page, Table, Text
from next_core.types import Progress

CUTS = 12
DRAWS = 5
MARKS = {"above": " ↑", "below": " ↓", None: ""}
CAPTIONS = {
    "figures": "Each figure against random walks with the same step lengths.",
    "energy-ratios": "Share of the first singular triplet in a matrix's update, over the run.",
    "skill": "Skill of a straight line: the share of the squared error of making no jump that it removes.",
    "displacement": "Displacement over a number of steps: a random walk diffuses, a straight line keeps going.",
    "layers": "Layers by kind of matrix, all in one scale of colours.",
}


@dataclass(frozen=True)
class GeometryOptions:
    """What to measure: nothing unless ``wanted``; ``predictor`` is the one whose skill is shown by layer."""

    wanted: bool = True
    predictor: str = "secant"
    backbone: Path | None = None
    cache: DeltaCache | None = None


def add_geometry(
    page: Page, recorded: Recorded, options: GeometryOptions, progress: Progress | None
) -> LearningRate | None:
    """Add the figures of the checkpoints and a predictor's skill by layer; return what they say of the rate."""
    if not options.wanted:
        page.missing["Geometry"] = "excluded by --no-geometry"
        return None
    if not recorded.checkpoints.is_dir():
        page.missing["Geometry"] = f"there is no folder {recorded.checkpoints}"
        return None
    try:
        source = with_origin(open_checkpoints(recorded.checkpoints, options.backbone or recorded.backbone))
        full = all(parameter.rank is not None for parameter in source.parameters)
        history = History(source, 1, None, progress, spectrum=full, cache=options.cache)
        history.jump_log = recorded.records
        analysis = analyze(history)
    except (CheckpointError, ConfigError) as error:
        page.missing["Geometry"] = error.message
        return None
    page.sections["How the weights move"] = _analysis(page, analysis, history.cache_trouble)
    try:
        page.sections["Which layers can be predicted"] = _skill(page, source, analysis, options, progress)
    except NextCoreError as error:
        page.missing["Skill by layer"] = error.message
    return analysis.learning_rate


def _analysis(page: Page, analysis: Analysis, cache_trouble: str | None) -> list[Block]:
    about = (
        f"{counted(len(analysis.steps), 'checkpoint')} of steps {analysis.steps[0]} to {analysis.steps[-1]}; "
        f"deltas count from step {analysis.origin} and exclude the jumps. {len(analysis.matrices)} matrices "
        f"changed, {len(analysis.frozen)} did not. A random walk with the same step lengths shows "
        "much of the same structure, so each figure is compared with one."
    )
    found = [line for line in analysis.advice if line != learning_rate_advice(analysis.learning_rate)]
    blocks: list[Block] = [Text([about]), *([Text(found)] if found else [])]
    blocks += page.figure("Figures against random walks", charts.against_walks(analysis), CAPTIONS["figures"])
    for name, drawn in analysis.draw().items():
        blocks += page.figure(name.replace("-", " ").capitalize(), drawn, CAPTIONS[name])
    rows = []
    for name, one in analysis.overall.figures.items():
        if one.value is not None:
            walk = [NONE, NONE] if one.null is None else [decimal(one.null.mean), _ends((one.null.low, one.null.high))]
            run = [f"{decimal(one.value)}{MARKS[one.outside]}", _ends(one.quartiles)]
            rows.append([FIGURES[name].heading, *run, *walk, FIGURES[name].words])
    ahead = "" if analysis.horizon is None else f" Out-of-sample figures: {analysis.horizon} steps ahead."
    note = f"Run: median over matrices. Random walk: mean; ↑ above, ↓ below its 95%.{ahead}"
    names = ["figure", "run", "quartiles", "random walk", "95%", "meaning"]
    blocks += [Table("All matrices against random walks", names, rows, note)] if rows else []
    unmeasured: dict[str, list[str]] = {}
    for name, reason in analysis.missing.items():
        unmeasured.setdefault(reason, []).append(FIGURES[name].heading)
    page.missing |= {", ".join(some): reason for reason, some in unmeasured.items()}
    return [*blocks, *([Text([f"{cache_trouble}."])] if cache_trouble else [])]


def _skill(
    page: Page, source: CheckpointSource, analysis: Analysis, options: GeometryOptions, progress: Progress | None
) -> list[Block]:
    history = History(source, 1, None, progress, cache=options.cache)
    found = backtest(history, [options.predictor], cuts=CUTS, draws=DRAWS, progress=progress)
    judged, cuts = found.predictors[options.predictor], found.cuts
    if judged.failures:
        page.missing[judged.name] = f"failed at {len(judged.failures)} cuts, for example: {judged.failures[0].reason}"
    if not judged.acted:
        reason = next(iter(judged.reasons), "it predicted no motion")
        page.missing["Skill by layer"] = f"{judged.name} predicted nothing: {reason}"
        return []
    score, null = judged.score.skill, judged.null
    interval = f" (95% {_ends(judged.interval)})" if judged.interval else ""
    walks = f"; random walks have {decimal(null.mean)} (95% {_ends((null.low, null.high))})" if null else ""
    upto = f"step {cuts[0]}" if len(cuts) == 1 else f"{len(cuts)} steps from {cuts[0]} to {cuts[-1]}"
    about = (
        f"{judged.name} was fitted to the checkpoints up to {upto}, and its prediction {found.horizon} steps "
        "ahead compared with what RL then did. Skill is the share of the squared error of making no jump that "
        f"it removes: 1 is exact, below 0 a jump does harm. Over all matrices it is {decimal(score)}{interval}{walks}."
    )
    known = [(name, one.skill, walk) for name, (one, walk) in judged.per_matrix.items() if one.skill is not None]
    known.sort(key=lambda one: -one[1])
    best, worst = (f"{known[at][0]} {decimal(known[at][1])}" if known else "" for at in (0, -1))
    ends = f" Best: {best}; worst: {worst}" if known else ""
    chart = charts.skill_by_layer(analysis, judged)
    caption = f"Skill of {judged.name}, {found.horizon} steps ahead; what lies below −1 has the colour of −1."
    figure = page.figure("Skill by layer", chart, caption, caption + ends)
    rows = [[name.removesuffix(".weight"), signed(s), signed(walk.mean) if walk else NONE] for name, s, walk in known]
    return [Text([about]), *figure, Table("Skill by matrix, best first", ["matrix", "skill", "random walk"], rows)]


def _ends(pair: tuple[float, float] | None) -> str:
    return NONE if pair is None else f"{decimal(pair[0])} to {decimal(pair[1])}"

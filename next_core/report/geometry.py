"""The geometry of a run from its checkpoints, as sections of its page; what cannot be measured says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from next_core.checkpoints import open_checkpoints
from next_core.diagnostics import FIGURES, Analysis, analyze, with_origin
from next_core.diagnostics.analysis_results import Figure
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.backtest_results import Backtest, Judged
from next_core.diagnostics.drawing import Drawing
from next_core.diagnostics.plots import draw_analysis
from next_core.errors import CheckpointError, ConfigError, NextCoreError
from next_core.history.delta_cache import DeltaCache
from next_core.history.history import History
from next_core.plugins import registry
from next_core.report.inputs import Recorded
from next_core.report.page import Block, Bullets, Cell, Columns, Missing, Picture, Section, Table, Text
from next_core.report.run_pictures import draw_beside_nulls, draw_skills
from next_core.report.words import NOTHING, counted, figure, signed
from next_core.types import Progress

CUTS = 12
DRAWS = 5
MOST_MATRICES = 5
"""So many of the best and of the worst are named."""
TITLES = {"geometry": "What is going on in the weights", "layers": "Which layers can be predicted"}
MARKS = {"above": " ↑", "below": " ↓", None: ""}
CAPTIONS = {
    "energy-ratios": "Share of the first singular triplet in the motion of a matrix, over the run.",
    "skill": "Skill of a straight line: the share of the squared error of staying put that it removes. Below 0, a jump "
    "along it does harm.",
    "displacement": "How far the weights get in a given number of steps: a random walk diffuses, a line goes on.",
    "layers": "Layers by kinds of matrices.",
    "figures": "Each figure beside what a random walk with the same step lengths has.",
}


@dataclass(frozen=True)
class GeometryOptions:
    """What of the geometry is wanted: ``wanted`` false leaves it out."""

    wanted: bool = True
    predictor: str = "secant"
    backbone: Path | None = None
    cache: DeltaCache | None = None


def check_predictor(settings: GeometryOptions) -> None:
    """Raise ``PluginError`` for a predictor that is unknown, before the work."""
    if settings.wanted:
        registry().make_config("predictor", settings.predictor, {})


def geometry_sections(recorded: Recorded, settings: GeometryOptions, progress: Progress | None) -> list[Section]:
    """Figures beside random walks, and a predictor's skill by layer."""
    if not settings.wanted:
        return [Section("geometry", TITLES["geometry"], [Missing("Geometry", "left out, as --no-geometry asks")])]
    if not recorded.checkpoints.is_dir():
        where = f"there is no folder {recorded.checkpoints}"
        return [Section("geometry", TITLES["geometry"], [Missing("Geometry", where)])]
    try:
        source = with_origin(open_checkpoints(recorded.checkpoints, settings.backbone or recorded.backbone))
        full = all(parameter.rank is not None for parameter in source.parameters)
        history = History(source, 1, None, progress, spectrum=full, cache=settings.cache)
        history.jump_log = recorded.records
        analysis = analyze(history)
    except (CheckpointError, ConfigError) as error:
        return [Section("geometry", TITLES["geometry"], [Missing("Geometry", str(error))])]
    blocks = _geometry(analysis)
    if history.cache_trouble is not None:
        blocks.append(Text(f"{history.cache_trouble}.", aside=True))
    layers: list[Block]
    try:
        found = backtest(
            History(source, 1, None, progress, cache=settings.cache),
            [settings.predictor],
            cuts=CUTS,
            draws=DRAWS,
            progress=progress,
        )
        layers = _layers(analysis, found, found.predictors[settings.predictor])
    except NextCoreError as error:
        layers = [Missing("Skill by layer", str(error))]
    return [Section("geometry", TITLES["geometry"], blocks), Section("layers", TITLES["layers"], layers)]


def _geometry(analysis: Analysis) -> list[Block]:
    steps = analysis.steps
    spacing = "evenly" if analysis.even else "unevenly"
    blocks: list[Block] = [
        Text(
            f"{counted(len(steps), 'checkpoint')} of steps {steps[0]} to {steps[-1]}, {spacing} spaced, counted from "
            f"step {analysis.origin}; jumps are taken out, so that what is seen is RL's own motion. "
            f"{counted(len(analysis.matrices), 'matrix moves', 'matrices move')}, {len(analysis.frozen)} do not. Each "
            "figure stands beside that of random walks with the same step lengths: what looks like structure is often "
            "there in a random walk too."
        ),
        Bullets(analysis.advice),
    ]
    pictures: list[Picture] = []
    for name, drawn in {"figures": draw_beside_nulls(analysis), **draw_analysis(analysis)}.items():
        if isinstance(drawn, str):
            blocks.append(Missing(CAPTIONS[name].split(":")[0].rstrip("."), drawn))
        else:
            pictures.append(Picture(drawn, CAPTIONS[name], _described(name, analysis)))
    if pictures:
        blocks.append(Columns([*(one for one in pictures if not one.wide), *(one for one in pictures if one.wide)]))
    if analysis.matrices:
        blocks.append(_table(analysis))
    return blocks


def _described(name: str, analysis: Analysis) -> str:
    """What a picture shows, in words."""
    told = {
        "energy-ratios": ("squared_energy_ratio_global", "squared_energy_ratio_local"),
        "skill": ("pinned_skill", "line_skill"),
        "displacement": ("msd_exponent",),
        "layers": ("squared_energy_ratio_global", "cosine_local"),
        "figures": ("c1_r2", "squared_energy_ratio_global", "cosine_local"),
    }[name]
    figures = analysis.overall.figures
    values = [f"{FIGURES[one].heading} {_beside(figures[one])}" for one in told if one in figures]
    return f"{CAPTIONS[name]} {'; '.join(values)}"


def _beside(one: Figure) -> str:
    return figure(one.value) + ("" if one.null is None else f", random walk {figure(one.null.mean)}")


def _table(analysis: Analysis) -> Table:
    rows: list[list[Cell | str]] = []
    for name, one in analysis.overall.figures.items():
        if one.value is None:
            continue
        null = one.null
        walk = (NOTHING, NOTHING) if null is None else (figure(null.mean), _range((null.low, null.high)))
        value = figure(one.value) + MARKS[one.outside]
        rows.append([FIGURES[name].heading, value, _range(one.quartiles), *walk, FIGURES[name].words])
    ahead = "" if analysis.horizon is None else f" Out of sample: {analysis.horizon} steps ahead."
    notes = [f"Of the run the median over matrices, of the random walk the mean; ↑ above, ↓ below its 95%.{ahead}"]
    missing = _by_reason(analysis.missing)
    notes += [f"Not measured: {', '.join(FIGURES[name].heading for name in names)}: {why}." for why, names in missing]
    headings = ["figure", "run", "quartiles", "random walk", "95%", "what it is"]
    return Table("All matrices beside random walks", headings, rows, words=["figure", "what it is"], notes=notes)


def _by_reason(missing: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        found.setdefault(why, []).append(name)
    return list(found.items())


def _layers(analysis: Analysis, found: Backtest, judged: Judged) -> list[Block]:
    cuts = found.cuts
    between = f"step {cuts[0]}" if len(cuts) == 1 else f"{len(cuts)} steps from {cuts[0]} to {cuts[-1]}"
    blocks: list[Block] = [
        Text(
            f"{judged.name} was fitted to what was known at {between}, and its prediction {found.horizon} steps ahead "
            "compared with what RL then did. Skill is the share of the squared error of staying put that the "
            "prediction removes: 1 is exact, 0 is staying put, below 0 a jump does harm."
        )
    ]
    if judged.failures:
        worst = judged.failures[0]
        blocks.append(Missing(judged.name, f"failed at {counted(len(judged.failures), 'cut')}, such as {worst.reason}"))
    if not judged.acted:
        why = next(iter(judged.reasons), "it predicted no motion")
        blocks.append(Missing("Skill by layer", f"{judged.name} never acted: {why}"))
        return blocks
    null = judged.null
    walk = (
        ""
        if null is None
        else f"; random walks have {figure(null.mean)} (95% {figure(null.low)} to {figure(null.high)})"
    )
    interval = judged.interval
    spread = "" if interval is None else f" (95% {figure(interval[0])} to {figure(interval[1])})"
    blocks.append(Text(f"Over all matrices its skill is {figure(judged.score.skill)}{spread}{walk}."))
    drawn = draw_skills(analysis, judged)
    if isinstance(drawn, Drawing):
        caption = (
            f"Skill of {judged.name} by layer and kind of matrix, {found.horizon} steps ahead. Colours end at −1 and 1."
        )
        blocks.append(Columns([Picture(drawn, caption, f"{caption} {_extremes(judged)}"), _matrices(judged)]))
    else:
        blocks.append(Missing("Skill by layer", drawn))
        blocks.append(_matrices(judged))
    return blocks


def _range(ends: tuple[float, float] | None) -> str:
    return NOTHING if ends is None else f"{figure(ends[0])} to {figure(ends[1])}"


def _ranked(judged: Judged) -> list[tuple[str, float]]:
    """Matrices by their skill, the best first."""
    known = [(name, score.skill) for name, (score, _) in judged.per_matrix.items() if score.skill is not None]
    return sorted(known, key=lambda one: -one[1])


def _extremes(judged: Judged) -> str:
    ranked = _ranked(judged)
    return f"Best: {ranked[0][0]} {figure(ranked[0][1])}; worst: {ranked[-1][0]} {figure(ranked[-1][1])}"


def _matrices(judged: Judged) -> Table:
    """The best and the worst."""
    ranked = _ranked(judged)
    shown = ranked if len(ranked) <= 2 * MOST_MATRICES else [*ranked[:MOST_MATRICES], *ranked[-MOST_MATRICES:]]
    left = len(ranked) - len(shown)
    notes = [f"{left} in between are not shown."] if left else []
    rows: list[list[Cell | str]] = []
    for name, skill in shown:
        null = judged.per_matrix[name][1]
        rows.append([name.removesuffix(".weight"), signed(skill), NOTHING if null is None else signed(null.mean)])
    caption = "Skill by matrix, the best first"
    return Table(caption, ["matrix", "skill", "random walk"], rows, words=["matrix"], notes=notes)

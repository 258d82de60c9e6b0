"""The geometry of a run's weights, for its page; what cannot be measured is missing with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from next_core.checkpoints import open_checkpoints
from next_core.diagnostics import FIGURES, Analysis, analyze, with_origin
from next_core.diagnostics.backtest import backtest
from next_core.diagnostics.backtest_results import Judged
from next_core.errors import CheckpointError, ConfigError, NextCoreError
from next_core.history.delta_cache import DeltaCache
from next_core.history.history import History
from next_core.interfaces import CheckpointSource
from next_core.plugins import registry
from next_core.report import pictures
from next_core.report.inputs import Recorded
from next_core.report.page import Page
from next_core.types import Progress

CUTS = 12
DRAWS = 5
MOST_MATRICES = 5
"""How many of the best matrices are listed, and how many of the worst."""


@dataclass(frozen=True)
class GeometryOptions:
    """What to measure: nothing unless ``wanted``; ``predictor`` is the one whose skill is shown by layer."""

    wanted: bool = True
    predictor: str = "secant"
    backbone: Path | None = None
    cache: DeltaCache | None = None


def check_predictor(options: GeometryOptions) -> None:
    """Raise ``PluginError`` for an unknown predictor, before the work."""
    if options.wanted:
        registry().make_config("predictor", options.predictor, {})


def add_geometry(page: Page, recorded: Recorded, options: GeometryOptions, progress: Progress | None) -> None:
    """Measure the checkpoints and add the figures, against random walks, and a predictor's skill by layer."""
    page.facts |= {"analysis": None, "skill": None}
    if not options.wanted:
        page.missing["Geometry"] = "excluded by --no-geometry"
    elif not recorded.checkpoints.is_dir():
        page.missing["Geometry"] = f"there is no folder {recorded.checkpoints}"
    else:
        try:
            source = with_origin(open_checkpoints(recorded.checkpoints, options.backbone or recorded.backbone))
            analysis = _add_analysis(page, source, recorded, options, progress)
        except (CheckpointError, ConfigError) as error:
            page.missing["Geometry"] = error.message
            return
        try:
            _add_skill(page, source, analysis, options, progress)
        except NextCoreError as error:
            page.missing["Skill by layer"] = error.message


def _add_analysis(
    page: Page, source: CheckpointSource, recorded: Recorded, options: GeometryOptions, progress: Progress | None
) -> Analysis:
    full = all(parameter.rank is not None for parameter in source.parameters)
    history = History(source, 1, None, progress, spectrum=full, cache=options.cache)
    history.jump_log = recorded.records
    analysis = analyze(history)
    page.draw("figures", 4.4, pictures.nulls, analysis, what="Figures against random walks")
    titles = {"energy-ratios": "Energy ratios", "skill": "Skill of a straight line", "layers": "Layers"}
    for name, drawn in analysis.draw().items():
        page.keep(name, drawn, titles.get(name, name.capitalize()))
    missing: dict[str, list[str]] = {}
    for name, reason in analysis.missing.items():
        missing.setdefault(reason, []).append(FIGURES[name].heading)
    page.facts |= {
        "analysis": analysis,
        "figures": {name: figure for name, figure in analysis.overall.figures.items() if figure.value is not None},
        "described": FIGURES,
        "unmeasured": missing,
        "cache_trouble": history.cache_trouble,
    }
    return analysis


def _add_skill(
    page: Page, source: CheckpointSource, analysis: Analysis, options: GeometryOptions, progress: Progress | None
) -> None:
    history = History(source, 1, None, progress, cache=options.cache)
    found = backtest(history, [options.predictor], cuts=CUTS, draws=DRAWS, progress=progress)
    judged = found.predictors[options.predictor]
    page.facts |= {"skill": judged, "backtest": found, **_ranked(judged)}
    if judged.failures:
        page.missing[judged.name] = f"failed at {len(judged.failures)} cuts, for example: {judged.failures[0].reason}"
    if judged.acted:
        page.draw("skill-by-layer", 3.4, pictures.skills, analysis, judged, what="Skill by layer")
    else:
        reason = next(iter(judged.reasons), "it predicted no motion")
        page.missing["Skill by layer"] = f"{judged.name} predicted nothing: {reason}"


def _ranked(judged: Judged) -> dict[str, Any]:
    """Return the matrices with the highest and the lowest skill, each with that of its random walks."""
    known = [(name, score.skill, null) for name, (score, null) in judged.per_matrix.items() if score.skill is not None]
    known.sort(key=lambda one: -one[1])
    left_out = max(len(known) - 2 * MOST_MATRICES, 0)
    shown = [*known[:MOST_MATRICES], *known[-MOST_MATRICES:]] if left_out else known
    return {"matrices": shown, "left_out": left_out}

"""The API for notebooks: open a recorded run, measure it, backtest predictors on it, extrapolate it.

Everything here returns values with a short repr and a table in a notebook; pandas is imported by ``to_frame`` only.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from next_core.appliers.folder_contents import RECORD
from next_core.checkpoints import open_checkpoints
from next_core.cycle.journal import JOURNAL, read_journal, valid_jumps
from next_core.diagnostics import analysis
from next_core.diagnostics import backtest as backtests
from next_core.diagnostics.analysis_results import FIGURES, Analysis, Group
from next_core.diagnostics.backtest_results import Backtest
from next_core.diagnostics.drawing import BLUE, GREY, WIDTH, Drawing, check_drawing, draw, label
from next_core.diagnostics.plots import draw_analysis
from next_core.errors import CheckpointError, ConfigError
from next_core.history.history import History
from next_core.interfaces import Applied, CheckpointSource, WeightApplier
from next_core.plugins import PredictorLike, make_applier, resolve_predictor
from next_core.process.optional_packages import import_optional
from next_core.sources.jumps import jump_places
from next_core.sources.source_views import with_origin
from next_core.storage.atomic import move_directory, remove_directory
from next_core.types import Progress


class Metrics(Mapping[int, Mapping[str, float]]):
    """What the trainer logged, by RL step."""

    def __init__(self, logged: Mapping[int, Mapping[str, float]]) -> None:
        self._logged = logged

    def __getitem__(self, step: int) -> Mapping[str, float]:
        return self._logged[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._logged)

    def __len__(self) -> int:
        return len(self._logged)

    def __repr__(self) -> str:
        names = sorted({name for record in self._logged.values() for name in record})
        return f"<Metrics of {len(self)} steps: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}>"

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: one row per step, one column per metric."""
        frame = import_optional("pandas", "notebook").DataFrame.from_dict(dict(self._logged), orient="index")
        return frame.rename_axis("step").sort_index()

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(max_rows=20))


class RecordedRun:
    """The checkpoints of one run, opened: ``source`` reads them, ``history`` is what predictors fit."""

    def __init__(self, source: CheckpointSource, path: Path | None = None) -> None:
        self.source, self.path = source, path

    @property
    def steps(self) -> tuple[int, ...]:
        """The observed RL steps, ascending."""
        return self.source.steps

    @property
    def metrics(self) -> Metrics:
        """What the trainer logged, by step."""
        return Metrics(self.source.logged_metrics())

    @property
    def jumps(self) -> list[dict[str, Any]]:
        """The jumps of a run folder that count, as its journal records them; empty for other checkpoints."""
        journals = [place.parent / JOURNAL for place in jump_places(self.path)] if self.path is not None else []
        return next((valid_jumps(read_journal(journal)) for journal in journals if journal.exists()), [])

    def history(self, rank: int = 1, **options: Any) -> History:
        """Return the trajectory of every matrix that moves, with rank-``rank`` components; options as ``History``."""
        history = History(self.source, rank, **options)
        history.jump_log = self.jumps
        return history

    def __repr__(self) -> str:
        return f"<RecordedRun {', '.join(f'{key} {value}' for key, value in self._facts().items())}>"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in self._facts().items())
        return f"<table>{''.join(rows)}</table>"

    def _facts(self) -> dict[str, object]:
        ranks = sorted({parameter.rank for parameter in self.source.parameters if parameter.rank is not None})
        span = f"{self.steps[0]} to {self.steps[-1]} ({len(self.steps)})" if self.steps else "none"
        return {
            "path": self.path or self.source.name,
            "layout": f"{self.source.name} {self.source.naming}".strip(),
            "steps": span,
            "matrices": len(self.source.parameters),
            "rank": "/".join(map(str, ranks)) or "full",
            **({"metrics": f"{len(self.metrics)} steps"} if self.metrics else {}),
        }


def open_run(
    path: str | Path | Sequence[str | Path],
    backbone: str | Path | None = None,
    layout: str | None = None,
    **options: bool,
) -> RecordedRun:
    """Open a run's folder, any folder of checkpoints, or a list of checkpoints.

    ``backbone`` is the base model's folder, where deltas need one; ``options`` are those of ``open_checkpoints``
    (``skip_damaged``, ``allow_pickle``, ``masters``). Raises ``CheckpointError`` for what cannot be read.
    """
    folder = Path(path) if isinstance(path, str | Path) else None
    if folder is not None and (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    source = open_checkpoints(path if folder is None else folder, backbone, layout, **options)
    return RecordedRun(source, folder)


def analyze(
    run: RecordedRun | History | CheckpointSource | str | Path,
    *,
    horizon: int | None = None,
    draws: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> RunAnalysis:
    """Measure the geometry of a run, each figure with its random-walk null; see ``diagnostics.analyze``."""
    if isinstance(run, History):
        history = run
    else:
        opened = _opened(run)
        lora = all(parameter.rank is not None for parameter in opened.source.parameters)
        history = History(with_origin(opened.source), 1, None, progress, spectrum=lora)
        history.jump_log = opened.jumps
    found = analysis.analyze(history, horizon=horizon, draws=draws, seed=seed)
    return RunAnalysis(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def backtest(
    run: RecordedRun | History | CheckpointSource | str | Path,
    predictors: Sequence[PredictorLike] | None = None,
    *,
    horizon: int | None = None,
    rank: int = 1,
    **options: Any,
) -> RunBacktest:
    """Judge predictors on a recorded run, walking forward; ``options`` as ``diagnostics.backtest.backtest``.

    Stay, random and ridge are always judged too, as baselines.
    """
    history = run if isinstance(run, History) else _opened(run).history(rank)
    found = backtests.backtest(history, predictors, horizon=horizon, **options)
    return RunBacktest(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})


def extrapolate(
    run: RecordedRun | CheckpointSource | str | Path,
    predictor: PredictorLike,
    horizon: int,
    out: str | Path,
    *,
    alpha: float = 1.0,
    applier: str | WeightApplier | None = None,
    rank: int = 1,
    overwrite: bool = False,
) -> Applied:
    """Write the weights that a predictor expects ``horizon`` RL steps past the newest checkpoint to the folder ``out``.

    ``applier`` None: a PEFT adapter from a LoRA run, a model folder from full checkpoints. ``overwrite`` replaces an
    earlier result of ours, and nothing else. Raises ``CheckpointError`` when the predictor abstains.
    """
    opened, target = _opened(run), Path(out)
    full = any(parameter.rank is None for parameter in opened.source.parameters)
    if applier is None:
        applier = "merged-model" if full else "peft-adapter"
    writer = applier if isinstance(applier, WeightApplier) else make_applier(applier)
    earlier = target.exists()
    if earlier and not (overwrite and (target / RECORD).is_file()):
        remedy = "it was not written by extrapolate, so it is not replaced" if overwrite else "pass overwrite=True"
        raise ConfigError(
            f"{target} exists already; {remedy}, or choose another folder", kind="config-folder-not-empty"
        )
    prediction = resolve_predictor(predictor)().fit(opened.history(rank)).predict(horizon)
    if prediction.abstention is not None:
        raise CheckpointError(f"no prediction from {opened!r}: {prediction.abstention}", kind="predictor-abstained")
    if not earlier:
        return writer.apply(prediction, alpha, out=target)
    scratch = target.with_name(f".{target.name}.new")
    if scratch.exists():  # of a call that was killed
        remove_directory(scratch)
    applied = writer.apply(prediction, alpha, out=scratch)
    remove_directory(target)
    move_directory(scratch, target)
    return applied


def _opened(run: RecordedRun | CheckpointSource | str | Path) -> RecordedRun:
    if isinstance(run, RecordedRun):
        return run
    return RecordedRun(run) if isinstance(run, CheckpointSource) else open_run(run)


class Pictures(dict[str, Drawing]):
    """Pictures by name; a notebook shows them all."""

    def _repr_html_(self) -> str:
        return "".join(f"<figure>{drawing.svg()}</figure>" for drawing in self.values())


@dataclasses.dataclass(frozen=True, repr=False)
class RunAnalysis(Analysis):
    """An analysis with tables and pictures."""

    def to_frame(self, by: Literal["matrix", "layer", "kind"] = "matrix") -> Any:
        """Return a pandas DataFrame with one column per figure, one row per matrix, layer or kind of matrix."""
        groups: Mapping[Any, Group] = getattr(self, {"matrix": "matrices", "layer": "layers", "kind": "kinds"}[by])
        rows = {
            name: {
                **({"layer": group.layer, "kind": group.kind} if by == "matrix" else {}),
                **{figure: group.value(figure) for figure in FIGURES},
            }
            for name, group in groups.items()
        }
        return import_optional("pandas", "notebook").DataFrame.from_dict(rows, orient="index").rename_axis(by)

    def plot(self, name: str | None = None) -> Drawing | Pictures:
        """Draw all pictures, or one by name. Raises ``ConfigError`` with the reason when it cannot be drawn."""
        drawn = draw_analysis(self)
        if name is None:
            return Pictures({key: one for key, one in drawn.items() if isinstance(one, Drawing)})
        chosen = drawn.get(name, f"no such picture; known: {', '.join(drawn)}")
        if not isinstance(chosen, Drawing):
            raise ConfigError(f"'{name}' cannot be drawn: {chosen}", kind="config-invalid-value")
        return chosen

    def __repr__(self) -> str:
        steps = f"steps {self.steps[0]} to {self.steps[-1]}"
        return f"<Analysis of {len(self.matrices)} matrices, {steps}; {' '.join(self.advice)}>"

    def _repr_html_(self) -> str:
        return str(self.to_frame("kind").to_html(float_format="%.3g"))


@dataclasses.dataclass(frozen=True, repr=False)
class RunBacktest(Backtest):
    """A backtest with a table and a picture."""

    def to_frame(self) -> Any:
        """Return a pandas DataFrame, one row per predictor, the best first: skill, its interval and its null."""
        rows = {
            name: {key: value for key, value in judged.as_dict().items() if isinstance(value, float | int | None)}
            for name, judged in self.predictors.items()
        }
        return import_optional("pandas", "notebook").DataFrame.from_dict(rows, orient="index").rename_axis("predictor")

    def plot(self) -> Drawing:
        """Draw each predictor's skill with its 95% interval, and the 95% interval of random walks in grey."""
        check_drawing()
        drawn = draw("backtest", (WIDTH, 0.8 + 0.35 * len(self.predictors)), _skills, self)
        if isinstance(drawn, str):
            raise ConfigError(f"the backtest cannot be drawn: {drawn}", kind="config-invalid-value")
        return drawn

    def __repr__(self) -> str:
        skills = ", ".join(f"{n} {j.score.skill:.2f}" for n, j in self.predictors.items() if j.score.skill is not None)
        return f"<Backtest over {len(self.cuts)} cuts, horizon {self.horizon}; skill: {skills}>"

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(float_format="%.3g"))


def _skills(picture: Any, found: Backtest) -> str | None:
    judged = [one for one in list(found.predictors.values())[::-1] if one.score.skill is not None]
    if not judged:
        return "no predictor has a skill: nothing moved"
    axis = picture.subplots()
    for row, one in enumerate(judged):
        if one.null is not None:
            axis.plot([one.null.low, one.null.high], [row, row], color=GREY, linewidth=6, alpha=0.4)
        if one.interval is not None:
            axis.plot(one.interval, [row, row], color=BLUE, linewidth=1.5)
        axis.plot([one.score.skill], [row], "o", color=BLUE, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(judged)), [label(one.name) for one in judged])
    axis.set_xlabel(f"skill at horizon {found.horizon}: 1 is exact, 0 is no jump; grey: random walks")
    return None

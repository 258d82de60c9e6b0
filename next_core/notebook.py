"""The API for notebooks: open a recorded run, measure it, backtest predictors on it, extrapolate it.

Everything here returns values with a short repr and a table in a notebook; pandas is imported by ``to_frame`` only.
"""

import html
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from next_core.appliers.folder_applier import FolderApplier, WrittenFolder
from next_core.appliers.folder_contents import RECORD
from next_core.checkpoints import open_checkpoints
from next_core.cycle.journal import JOURNAL, read_journal, valid_jumps
from next_core.diagnostics import analysis
from next_core.diagnostics import backtest as backtests
from next_core.diagnostics.analysis_results import Analysis
from next_core.diagnostics.backtest_results import Backtest
from next_core.errors import CheckpointError, ConfigError
from next_core.history.history import History
from next_core.interfaces import Applied, CheckpointSource, WeightApplier
from next_core.interfaces.checkpoint_source import WARNING
from next_core.plugins import PredictorLike, make_applier, resolve_predictor
from next_core.process.optional_packages import import_optional
from next_core.sources.jumps import jump_places
from next_core.sources.source_views import with_origin
from next_core.storage.atomic import move_directory, remove_directory
from next_core.types import Progress


class Metrics(dict[int, Mapping[str, float]]):
    """What the trainer logged, by RL step."""

    def __repr__(self) -> str:
        names = sorted({name for record in self.values() for name in record})
        return f"<Metrics of {len(self)} steps: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}>"

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: one row per step, one column per metric."""
        frame = import_optional("pandas", "notebook").DataFrame.from_dict(self, orient="index")
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
    *,
    start: str | Path | None = None,
    **options: bool,
) -> RecordedRun:
    """Open a run's folder, any folder of checkpoints, or a list of checkpoints.

    ``backbone`` is the base model's folder, where deltas need one; ``start`` is the adapter that RL began from, where
    there is no checkpoint of step 0; ``options`` are those of ``open_checkpoints`` (``skip_damaged``,
    ``allow_pickle``, ``masters``). Warns if the run seems to continue an adapter that is not named. Raises
    ``CheckpointError`` for what cannot be read.
    """
    folder = Path(path) if isinstance(path, str | Path) else None
    if folder is not None and (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    source = open_checkpoints(path if folder is None else folder, backbone, layout, start=start, **options)
    for note in source.notes:
        if note.startswith(WARNING):
            warnings.warn(note.removeprefix(WARNING), stacklevel=2)
    return RecordedRun(source, folder)


def analyze(
    run: RecordedRun | History | CheckpointSource | str | Path,
    *,
    horizon: int | None = None,
    draws: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Measure the geometry of a run, each figure with its random-walk null; see ``diagnostics.analyze``."""
    if isinstance(run, History):
        history = run
    else:
        opened = _opened(run)
        lora = all(parameter.rank is not None for parameter in opened.source.parameters)
        history = History(with_origin(opened.source), 1, None, progress, spectrum=lora)
        history.jump_log = opened.jumps
    return analysis.analyze(history, horizon=horizon, draws=draws, seed=seed)


def backtest(
    run: RecordedRun | History | CheckpointSource | str | Path,
    predictors: Sequence[PredictorLike] | None = None,
    *,
    horizon: int | None = None,
    rank: int = 1,
    **options: Any,
) -> Backtest:
    """Judge predictors on a recorded run, walking forward; ``options`` as ``diagnostics.backtest.backtest``.

    Stay, random and ridge are always judged too, as baselines.
    """
    history = run if isinstance(run, History) else _opened(run).history(rank)
    return backtests.backtest(history, predictors, horizon=horizon, **options)


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
    writer = applier if isinstance(applier, WeightApplier) else make_applier(applier or opened.source.applier)
    earlier = target.exists()
    if earlier and not (overwrite and (target / RECORD).is_file()):
        remedy = "it was not written by extrapolate, so it is not replaced" if overwrite else "pass overwrite=True"
        raise ConfigError(
            f"{target} exists already; {remedy}, or choose another folder", kind="config-folder-not-empty"
        )
    if earlier and isinstance(writer, FolderApplier):
        writer.check_source(opened.source, target, dry_run=True)  # what is being read must not be replaced
    made = resolve_predictor(predictor)()
    prediction = made.fit(opened.history(rank)).predict(horizon)
    if prediction.abstention is not None:
        raise CheckpointError(
            f"{made.name}: no prediction from {opened!r}: {prediction.abstention}", kind="predictor-abstained"
        )
    if not earlier:
        return writer.apply(prediction, alpha, out=target)
    scratch = target.with_name(f".{target.name}.new")
    if scratch.exists():  # of a call that was killed
        remove_directory(scratch)
    applied = writer.apply(prediction, alpha, out=scratch)
    remove_directory(target)
    move_directory(scratch, target)
    if isinstance(applied, WrittenFolder):
        applied.path = target
    return applied


def _opened(run: RecordedRun | CheckpointSource | str | Path) -> RecordedRun:
    if isinstance(run, RecordedRun):
        return run
    return RecordedRun(run) if isinstance(run, CheckpointSource) else open_run(run)

"""``backtest``: predictors judged on a recorded run, walking forward, without training; see docs/backtest.md."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from next_core.diagnostics.backtest_cut import Coordinates, CutHistory, Shared
from next_core.diagnostics.backtest_geometry import Asked, Grams, MeasureMotion, MeasurePredictions
from next_core.diagnostics.backtest_inputs import BacktestInputs, make_setting
from next_core.diagnostics.backtest_results import Backtest, Failure, Judged, Score, WalkNull, skill_interval
from next_core.errors import PluginError
from next_core.history.executor import Executor, Task
from next_core.history.history import DeltaKind, History, Result
from next_core.interfaces import CheckpointSource, Prediction
from next_core.plugins import registry
from next_core.predictor import TrajectoryPredictor
from next_core.types import Progress

BASELINES = ("stay", "random", "ridge")
"""Always there: no jump, a jump in a random direction, the linear control."""
Chosen = Mapping[str, Mapping[str, Any]]
"""Predictors by name, each with the fields of its config."""


def backtest(
    run: CheckpointSource | History,
    predictors: Sequence[str] | Chosen | None = None,
    *,
    horizon: int | None = None,
    cuts: int | None = None,
    draws: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Backtest:
    """Predict ``horizon`` RL steps ahead from every observed step that has one so much later, and compare.

    At each cut a predictor is fitted to what was observed by then, and to nothing else. It is judged in merged space at
    alpha 1, with its own confidences. ``predictors`` are registered names, or names with fields; None takes those that
    treat each matrix alone. A ``History`` brings its rank, compressor, cache and executor. ``horizon`` None is
    ``default_horizon``'s; ``cuts`` limits the cuts to so many, evenly spaced back from the last. ``draws`` random walks
    (``next_core.sources.replay.Signs``) give each figure its null; 0 is none.

    A predictor that raises or answers nonsense is reported in its ``failures``. Raises ``PluginError`` for an unknown
    predictor, ``ConfigError`` for its fields or a horizon that no two checkpoints span, ``CheckpointError`` for what
    cannot be read, such as a backbone that is missing.
    """
    chosen, notes = _choose(predictors)
    whole = run if isinstance(run, History) else History(run)
    setting = make_setting(whole.source, horizon, cuts, draws, seed, whole.steps)
    return _Replay(whole, setting, chosen, progress).judge(notes)


def default_predictors() -> tuple[list[str], list[str]]:
    """Those that treat each matrix alone, and notes on what was left out; a network for all is trained at every cut."""
    known, notes = registry(), []
    alone: list[str] = []
    shared: list[str] = []
    for name in known.names("predictor"):
        try:
            (shared if known.get("predictor", name).shares else alone).append(name)
        except PluginError as error:
            notes.append(str(error))
    if shared:
        notes.append(f"not judged, as they train at every cut: {', '.join(shared)}; name them, or all")
    return alone, notes


def _choose(predictors: Sequence[str] | Chosen | None) -> tuple[Chosen, list[str]]:
    """The predictors with their fields, baselines included, checked before any work."""
    notes: list[str] = []
    if predictors is None:
        predictors, notes = default_predictors()
    every: dict[str, Mapping[str, Any]] = {name: {} for name in BASELINES}
    every |= predictors if isinstance(predictors, Mapping) else {name: {} for name in predictors}
    for name, fields in every.items():
        registry().make_config("predictor", name, fields)
    return every, notes


class _Replay:
    """One backtest at work; what predictors said is kept until all of one matrix is measured at once."""

    def __init__(self, whole: History, setting: BacktestInputs, chosen: Chosen, progress: Progress | None) -> None:
        self.whole, self.setting, self.chosen, self.progress = whole, setting, chosen, progress
        self.names = tuple(sorted(whole.shapes))
        self.seconds: dict[str, float] = defaultdict(float)
        self.failures: dict[str, list[Failure]] = defaultdict(list)
        self.reasons: dict[str, dict[int, str]] = defaultdict(dict)
        self.asked: dict[str, list[Asked]] = {name: [] for name in self.names}
        self.owners: dict[str, list[str]] = {name: [] for name in self.names}
        self.grams: Mapping[str, Grams] = {}
        self.coordinates: dict[int, Coordinates] = {}

    def judge(self, notes: Sequence[str]) -> Backtest:
        """Measure the motion, predict at every cut of the run and of its walks, measure the predictions."""
        setting, begin = self.setting, time.perf_counter()
        self.grams = self._map("read motion", MeasureMotion(setting), self.whole.executor)
        kept = self._keeps_step_0()
        self.coordinates = {cut: Coordinates(setting, cut, kept) for cut in setting.cuts}
        walks = 1 + setting.draws
        total, done = walks * len(setting.cuts) * len(self.chosen), 0
        for draw in range(walks):
            shared: Shared = {}
            for cut in reversed(setting.cuts):  # the last one decomposes at once what those before it share
                # A jump still to come shows in no delta before it: these differ from cut to cut.
                history = CutHistory(self.whole, setting, draw, cut, self.grams, {} if setting.jumps else shared)
                for name in self.chosen:
                    self._predict(name, history, draw, cut)
                    done += 1
                    if self.progress is not None:
                        self.progress("predict", done, total)
        sums = self._sums(self._map("compare", MeasurePredictions(setting, self.grams, self.asked), Executor()))
        judged = sorted((self._judged(name, sums[name]) for name in self.chosen), key=_skill, reverse=True)
        return Backtest(
            horizon=setting.horizon,
            cuts=setting.cuts,
            block=setting.block,
            draws=setting.draws,
            seed=setting.seed,
            matrices=len(self.names),
            predictors={one.name: one for one in judged},
            shared_seconds=time.perf_counter() - begin - sum(self.seconds.values()),
            notes=tuple(notes),
        )

    def _map(self, what: str, task: Task[Result], executor: Executor) -> dict[str, Result]:
        found: dict[str, Result] = {}
        for name, value in zip(self.names, executor.map(task, self.names), strict=True):
            found[name] = value
            if self.progress is not None:
                self.progress(what, len(found), len(self.names))
        return found

    def _keeps_step_0(self) -> bool:
        """Whether the adapter that RL began with can be read."""
        return any(self.grams[name].kept for name in self.names)

    def _predict(self, name: str, history: History, draw: int, cut: int) -> None:
        """Fit and predict, and take down what was said; failures of the run itself are reported."""
        setting = self.setting
        problem: str | None = None
        try:
            predictor: TrajectoryPredictor = registry().make("predictor", name, **self.chosen[name])
            predictor.progress = self.progress
            _prepare(history, predictor, setting.horizon)
            begin = time.perf_counter()
            prediction = predictor.fit(history).predict(setting.horizon)
            if draw == 0:
                self.seconds[name] += time.perf_counter() - begin
            problem = self._take(name, prediction, draw, cut)
        except Exception as error:  # anybody's code: it must not end the backtest
            problem = f"{type(error).__name__}: {error}"
        if problem is not None and draw == 0:
            self.failures[name].append(Failure(cut, problem))

    def _take(self, name: str, prediction: Any, draw: int, cut: int) -> str | None:
        """Keep what it moves each matrix by; the problem, where a part of it cannot be used."""
        if not isinstance(prediction, Prediction):
            return f"predict answered {type(prediction).__name__}; return a Prediction"
        if prediction.step != cut:
            return f"the prediction counts from step {prediction.step}, but the newest observed is {cut}"
        problems, moving = [], 0
        if prediction.abstention is None:
            for matrix in prediction.updates:
                if matrix not in self.whole.shapes:
                    problems.append(f"the prediction names '{matrix}', which the run does not have")
                    continue
                try:
                    shape, rank = self.whole.shapes[matrix], self.whole.ranks[matrix]
                    asked = self.coordinates[cut].ask(prediction, matrix, draw, shape, rank is not None)
                except Exception as error:  # what is wrong with one update leaves the others
                    problems.append(f"{type(error).__name__}: {error}")
                    continue
                if asked is not None:
                    moving += 1
                    self.asked[matrix].append(asked)
                    self.owners[matrix].append(name)
        if not moving and not problems and draw == 0:
            why = Counter(prediction.abstained.values()).most_common(1)
            self.reasons[name][cut] = prediction.abstention or (why[0][0] if why else "it predicted no motion")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"{problems[0]}{more}" if problems else None

    def _sums(self, measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each predictor <P, P>, <P, D> and <D, D>: (draws + 1, cuts, matrices, 3)."""
        setting = self.setting
        places = {cut: index for index, cut in enumerate(setting.cuts)}
        motion = torch.zeros(1 + setting.draws, len(setting.cuts), len(self.names), 3, dtype=torch.float64)
        for column, name in enumerate(self.names):
            for draw in range(1 + setting.draws):
                for cut, row in places.items():
                    motion[draw, row, column, 2] = self.grams[name].at(draw, cut)[-1, -1].clamp_min(0)
        sums = {name: motion.clone() for name in self.chosen}
        for column, name in enumerate(self.names):
            for asked, owner, products in zip(self.asked[name], self.owners[name], measured[name], strict=True):
                sums[owner][asked.draw, places[asked.cut], column, :2] = products
        return sums

    def _judged(self, name: str, sums: Tensor) -> Judged:
        setting = self.setting
        run, score = sums[0], Score.of(sums[0])
        acted = (run[..., 0] > 0).any(-1)
        return Judged(
            name=name,
            fields=self.chosen[name],
            score=score,
            interval=skill_interval(run.sum(1), setting.block, setting.seed),
            null=WalkNull.of(score.skill, [Score.of(walk).skill for walk in sums[1:]]),
            acting=Score.of(run[acted]),
            acted=int(acted.sum()),
            abstained=len(self.reasons[name]) / len(setting.cuts),
            seconds=self.seconds[name],
            by_cut=tuple(Score.of(one).skill for one in run),
            per_matrix={matrix: _one(sums[:, :, column]) for column, matrix in enumerate(self.names)},
            failures=tuple(sorted(self.failures[name], key=lambda failure: failure.cut)),
            reasons=dict(Counter(self.reasons[name].values())),
        )


def _one(sums: Tensor) -> tuple[Score, WalkNull | None]:
    """The figures of one matrix, and their null."""
    score = Score.of(sums[0])
    return score, WalkNull.of(score.skill, [Score.of(walk).skill for walk in sums[1:]])


def _skill(judged: Judged) -> float:
    return -math.inf if judged.score.skill is None else judged.score.skill


def _prepare(history: History, predictor: TrajectoryPredictor, horizon: int) -> None:
    """Decompose what a predictor says that it reads, for it is shared and not the predictor's to pay for."""
    kinds: list[DeltaKind] = [kind for kind in get_args(DeltaKind) if kind in predictor.requires]
    if kinds and predictor.why_not(history.steps, horizon) is None:
        history.compress(*kinds, horizon=horizon)
